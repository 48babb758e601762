"""One progress bar for every place the project runs in.

In a terminal it is tqdm's; in a notebook it is one line that is redrawn in place and is left behind
finished; in a log it is that finished line alone.
"""

from __future__ import annotations

import sys
import time
import warnings
from types import TracebackType
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


class _Line:
    """A text that a notebook shows as plain text, also after it was saved and exported."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


class Progress:
    """Count finished items: ``with Progress(240, "spectrograms", "clip") as bar: bar.update()``.

    Parameters
    ----------
    total
        How many items there will be. ``None`` when that is unknown; set the attribute once it is known.
    what
        The work, as a short noun.
    unit
        One item, in the singular. ``"B"`` counts bytes, shown in kB, MB or GB.
    visible
        ``False`` shows nothing.
    """

    def __init__(self, total: int | None, what: str, unit: str, *, visible: bool = True) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.visible = visible
        self.n = self._first = 0
        self._started = self._drawn = time.monotonic()
        self._bar: Any = None
        self._handle: Any = None

    def __enter__(self) -> Progress:
        if not self.visible:
            return self
        if _in_notebook():
            from IPython.display import display

            self._handle = display(_Line(f"{self.what}: starting"), display_id=True)
        elif sys.stderr.isatty():
            self._bar = self._terminal_bar()
        return self

    def _terminal_bar(self) -> Any:
        count = {"total": self.total, "initial": self.n, "unit": self.unit, "unit_scale": self.unit == "B"}
        return tqdm(desc=self.what, leave=False, **count)

    def start_at(self, n: int) -> None:
        """Count on from ``n`` items that were there before; called again, it starts over."""
        self.n = self._first = n
        self._started = time.monotonic()
        if self._bar is not None:
            self._bar.close()
            self._bar = self._terminal_bar()

    def update(self, n: int = 1, note: str = "") -> None:
        """Count ``n`` more items, and show ``note`` beside the count."""
        self.n += n
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
        now = time.monotonic()
        if self._handle is not None and now - self._drawn > REDRAW_S:
            self._drawn = now
            self._handle.update(_Line(f"{self.what}: {self._count()}{self._time_left(now)}  {note}"))

    def write(self, text: str) -> None:
        """Show a line above the bar, in a terminal alone."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)

    def _count(self) -> str:
        """Return what is finished: ``240 clips``, ``12 of 240 clips``, ``7.68GB``."""
        numbers = [self.n] if self.total in (None, self.n) else [self.n, self.total]
        if self.unit == "B":
            return " of ".join(map(format_bytes, numbers))
        return f"{' of '.join(map(str, numbers))} {self.unit}s"

    def _time_left(self, now: float) -> str:
        n_counted = self.n - self._first
        if self.total is None or n_counted <= 0:
            return ""
        return f", {(now - self._started) / n_counted * (self.total - self.n):.0f} s left"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if not self.visible:
            return
        seconds = time.monotonic() - self._started
        line = f"{self.what}: {self._count()} in {seconds:.1f} s"
        if self._handle is not None:
            self._handle.update(_Line(line))
        else:
            print(line, flush=True)
