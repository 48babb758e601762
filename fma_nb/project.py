"""Where the project keeps its files, and the one error type meant for its users.

JupyterLab, papermill and the command line start in different folders and find the same files through it.
"""

import contextlib
import os
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

DATASETS = ("fma_mini", "fma_small", "fma_medium", "fma_large")
SYNTHETIC_DATASETS = ("fma_mini",)
SPLITS = ("train", "val", "test")
SHIPPED_WEIGHTS = Path(__file__).resolve().parent / "weights" / "crnn.pt"


class FmaNbError(Exception):
    """Bad input, told in one sentence that names the file or parameter and the way out.

    The command line prints the sentence without a traceback and exits with status 2.
    """


def project_root() -> Path:
    """Return the folder that holds ``notebooks/``, ``data/`` and ``outputs/``.

    It is the clone that this package lies in; the current folder where the package was installed alone.
    """
    clone = Path(__file__).resolve().parent.parent
    return clone if (clone / "notebooks").is_dir() else Path.cwd()


def data_dir() -> Path:
    """Return the data folder: ``$FMA_NB_DATA``, else ``data/`` in the project's root."""
    return user_path(os.environ.get("FMA_NB_DATA") or project_root() / "data")


def outputs_dir() -> Path:
    """Return the outputs folder: ``$FMA_NB_OUTPUTS``, else ``outputs/`` in the project's root."""
    return user_path(os.environ.get("FMA_NB_OUTPUTS") or project_root() / "outputs")


def user_path(text: str | Path) -> Path:
    """Return a path that a user gave as an absolute one: it means the folder where the command was typed.

    A kernel runs in the folder of its notebook; the shell that started it has left its own in ``PWD``.
    """
    typed_in = os.environ.get("PWD", "") if "ipykernel.kernelapp" in sys.modules else ""
    try:
        return Path(typed_in, Path(text).expanduser()).absolute()
    except RuntimeError as error:
        raise FmaNbError(f"{text}: that home folder is not known, so write the whole path.") from error


def audio_dir(dataset: str) -> Path:
    """Return the folder of a dataset's MP3s: ``raw/<dataset>``, or where else its archive was unpacked."""
    if dataset in SYNTHETIC_DATASETS:
        return data_dir() / "raw" / dataset
    return _unpacked(dataset, "[0-9][0-9][0-9]/", "[0-9]*.mp3")


def metadata_dir(dataset: str) -> Path:
    """Return the folder of the ``tracks.csv`` and ``genres.csv`` that describe a dataset.

    Synthetic rows live in a folder of their own, so that they never mix with FMA's.
    """
    if dataset in SYNTHETIC_DATASETS:
        return data_dir() / "raw" / f"{dataset}_metadata"
    return _unpacked("fma_metadata", "tracks.csv")


def _unpacked(name: str, *contents: str) -> Path:
    """Return where an archive's contents are: in ``raw/``, beside it, or in either one level too deep."""
    home, beside = data_dir() / "raw" / name, data_dir() / name
    for folder in (home, home / name, beside, beside / name):
        if any(any(folder.glob(pattern)) for pattern in contents):
            return folder
    return home


def spectrogram_dir(dataset: str, preset: str) -> Path:
    """Return the folder of a dataset's spectrogram PNGs, ``{train,val,test}/<Genre>/000002.png``."""
    return data_dir() / "spectrograms" / f"{dataset}-{preset}"


def run_dir(run: str) -> Path:
    """Return the folder of one run's notebooks, checkpoints, logs, metrics, figures and report.

    The runs of an ablation lie below it: ``fma_small/ablation/no_gru``.
    """
    parts = run.split("/ablation/")
    if any(not part or part in (".", "..") or Path(part).name != part for part in parts):
        raise FmaNbError(f"run={run!r} is not a plain folder name: choose one such as 'fma_small'.")
    return outputs_dir() / run


def clip_path(dataset: str, track_id: int) -> Path:
    """Return the path of a clip's MP3; see `clip_paths`."""
    return clip_paths(dataset, [track_id])[0]


def clip_paths(dataset: str, track_ids: Iterable[int]) -> list[Path]:
    """Return the paths of clips' MP3s in FMA's layout: the first three of six digits name a folder.

    A folder that holds MP3s and no such folders is flat. This is looked up once for all the tracks.
    """
    folder = audio_dir(dataset)
    flat = any(folder.glob("[0-9]*.mp3")) and not any(folder.glob("[0-9][0-9][0-9]/"))
    names = [f"{track_id:06d}" for track_id in track_ids]
    return [folder / ("" if flat else name[:3]) / f"{name}.mp3" for name in names]


def check_dataset(dataset: str) -> None:
    """Raise `FmaNbError` unless ``dataset`` is one of `DATASETS`."""
    if dataset not in DATASETS:
        raise FmaNbError(f"dataset={dataset!r} is unknown: choose one of {', '.join(DATASETS)}.")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` and rename it to ``path`` when the block succeeds.

    A killed or failing writer leaves nothing under the final name. The temporary name starts with a
    dot and ends in ``.tmp``, so that no reader takes it for data. Raises `FmaNbError` when the disk is
    full or not writable.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # it is not there, or the folder cannot be used at all
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all, see `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, or raise `FmaNbError` that says why it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(path: Path, error: OSError) -> FmaNbError:
    """Return the sentence for a file or folder that cannot be written."""
    return FmaNbError(
        f"{path} cannot be written ({error.strerror or error}): make space or give write access, "
        "then run the same command again."
    )
