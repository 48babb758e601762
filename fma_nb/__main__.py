"""``python -m fma_nb`` is the ``fma-nb`` command."""

import sys

from fma_nb.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
