"""One progress bar for every place the project runs in.

In a terminal it is tqdm's; in a notebook it is one line that is redrawn in place and is left behind
finished; in a log it is that finished line alone.
"""

import io
import sys
import warnings
from typing import Any

from tqdm import tqdm

with warnings.catch_warnings():  # librosa imports this, too; in a kernel without ipywidgets it warns, once
    warnings.simplefilter("ignore")
    import tqdm.auto as _  # noqa: F401

REDRAW_S = 0.5


def format_bytes(n: int) -> str:
    """Write a number of bytes in a decimal unit: ``7.68GB``."""
    return tqdm.format_sizeof(n, "B")


def _in_notebook() -> bool:
    """Tell whether a Jupyter kernel runs. A kernel has imported IPython, which is slow to import."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class Progress(tqdm):  # type: ignore[misc]  # tqdm has no types
    """Count finished items: ``with Progress(240, "spectrograms", "clip") as bar: bar.update()``.

    Where the total is not known, give ``None`` and set the attribute ``total`` once it is. The unit is one
    item, in the singular; ``"B"`` counts bytes, shown in kB, MB or GB.
    """

    monitor_interval = 0  # no thread beside the work: each update looks at the clock

    def __init__(self, total: int | None, what: str, unit: str, *, visible: bool = True) -> None:
        self._handle: Any = None
        if visible and _in_notebook():
            from IPython.display import display

            self._handle = display({"text/plain": f"{what}: starting"}, raw=True, display_id=True)
        self._in_terminal = self._handle is None and sys.stderr.isatty()
        where = {} if self._in_terminal else {"file": io.StringIO(), "mininterval": REDRAW_S}
        shown = {"desc": what, "unit": unit, "unit_scale": unit == "B", "leave": False}
        super().__init__(total=total, miniters=0, disable=not visible, **shown, **where)

    def start_at(self, n: int) -> None:
        """Count on from ``n`` items that were there before; called again, it starts over."""
        self.reset()
        self.n = self.initial = self.last_print_n = n
        self.refresh()

    def update(self, n: int = 1, note: str = "") -> None:
        """Count ``n`` more items, and show ``note`` beside the count."""
        self.set_postfix_str(note, refresh=False)
        super().update(n)

    def write(self, text: str) -> None:
        """Show a line above the bar, in a terminal alone."""
        if self._in_terminal:
            super().write(text, file=sys.stderr)

    def display(self, *arguments: Any, **options: Any) -> None:
        """Draw the bar; tqdm calls this when it is time to."""
        if self._in_terminal:
            super().display(*arguments, **options)
        elif self._handle is not None and self.n > self.initial:
            seconds = self.format_dict["elapsed"] / (self.n - self.initial) * ((self.total or 0) - self.n)
            left = f", {seconds:.0f} s left" if self.total else ""
            self._show(f"{self.desc}: {self._count()}{left}  {self.postfix}")

    def close(self) -> None:
        """Remove the bar and leave the finished line behind."""
        if self.disable:
            return
        super().close()
        line = f"{self.desc}: {self._count()} in {self.format_dict['elapsed']:.1f} s"
        if self._handle is not None:
            self._show(line)
        else:
            print(line, flush=True)

    def _show(self, text: str) -> None:
        """Replace the line in a notebook by another, kept as plain text."""
        self._handle.update({"text/plain": text}, raw=True)

    def _count(self) -> str:
        """Return what is finished: ``240 clips``, ``12 of 240 clips``, ``7.68GB``."""
        numbers = [self.n] if self.total in (None, self.n) else [self.n, self.total]
        if self.unit == "B":
            return " of ".join(map(format_bytes, numbers))
        return f"{' of '.join(map(str, numbers))} {self.unit}s"
