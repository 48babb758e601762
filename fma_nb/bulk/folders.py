"""Folders that several processes write to: one at a time, and nothing half-written stays."""

import os
from contextlib import AbstractContextManager
from pathlib import Path

import filelock

from fma_nb.project import atomic_path, cannot_write, make_folder


def check_writable(folder: Path) -> None:
    """Raise `FmaNbError` unless files can be written to a folder, or to the one that it would be made in."""
    existing = next(path for path in (folder, *folder.parents) if os.access(path, os.F_OK))
    with atomic_path(existing / ".writable") as temporary:
        temporary.touch()
    (existing / ".writable").unlink(missing_ok=True)


def locked(folder: Path) -> AbstractContextManager[object]:
    """Make a folder and keep others from writing to it inside a ``with`` block; wait for those who do."""
    make_folder(folder)
    try:
        return filelock.FileLock(folder / ".lock").acquire()
    except OSError as error:  # it may be another user's
        raise cannot_write(folder / ".lock", error) from error


def clear_temporaries(*folders: Path) -> None:
    """Remove what killed writers left behind below folders; call it while nobody else writes there."""
    for temporary in (path for folder in folders for path in folder.rglob(".*.tmp")):
        temporary.unlink(missing_ok=True)
