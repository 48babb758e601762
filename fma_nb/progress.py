"""One progress bar for every place the project runs in.

In a terminal it is tqdm's; in a notebook it is one line that is redrawn in place and is left behind
finished; in a log it is that finished line alone.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from IPython import get_ipython
from IPython.display import display
from tqdm import tqdm

REDRAW_S = 0.5


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
        How many items there will be.
    what
        The work, as a short noun.
    unit
        One item, in the singular.
    visible
        ``False`` shows nothing.
    """

    def __init__(self, total: int, what: str, unit: str, *, visible: bool = True) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.visible = visible
        self.n = 0
        self._started = self._drawn = time.monotonic()
        self._bar: Any = None
        self._handle: Any = None

    def __enter__(self) -> Progress:
        if not self.visible:
            return self
        if hasattr(get_ipython(), "kernel"):
            self._handle = display(_Line(f"{self.what}: starting"), display_id=True)
        elif sys.stderr.isatty():
            self._bar = tqdm(total=self.total, desc=self.what, unit=self.unit, leave=False)
        return self

    def update(self, n: int = 1, note: str = "") -> None:
        """Count ``n`` more items, and show ``note`` beside the count."""
        self.n += n
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
        now = time.monotonic()
        if self._handle is not None and now - self._drawn > REDRAW_S:
            self._drawn = now
            left = (now - self._started) / self.n * (self.total - self.n)
            text = f"{self.what}: {self.n}/{self.total} {self.unit}s, {left:.0f} s left  {note}"
            self._handle.update(_Line(text))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if not self.visible:
            return
        seconds = time.monotonic() - self._started
        count = f"{self.n}" if self.n == self.total else f"{self.n} of {self.total}"
        line = f"{self.what}: {count} {self.unit}s in {seconds:.1f} s"
        if self._handle is not None:
            self._handle.update(_Line(line))
        else:
            print(line, flush=True)
