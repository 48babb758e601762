"""``python -m fma_nb`` is the ``fma-nb`` command."""

from fma_nb.commands.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
