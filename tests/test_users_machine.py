"""The machines of users: folders as they name them, shells as they set them, streams as they close them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import soundfile as sf
from conftest import assert_one_sentence, music, write_mp3, write_png_tree
from jupyter_client.manager import start_new_kernel

from fma_nb.commands.cli import main, typed
from fma_nb.commands.notebooks import _checked_parameters
from fma_nb.commands.predict import load_classifier, predict
from fma_nb.project import FmaNbError, data_dir, outputs_dir, project_root
from fma_nb.recipe import Recipe

FOLDERS = ("FMA_NB_DATA", "FMA_NB_OUTPUTS")
SMALL = ("--dataset", "fma_small")


def typed_in(folder: Path, *command: str | bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command as a user types it in a folder of their own, with no other folder named than theirs."""
    theirs = {name: value for name, value in os.environ.items() if name not in FOLDERS}
    theirs |= {"PYTHONPATH": str(project_root())} | environment | {"PWD": str(folder)}
    return subprocess.run([sys.executable, *command], cwd=folder, env=theirs, capture_output=True)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> FmaNbError:
    """Return the sentence with which the command line refuses to work."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return FmaNbError(printed.err.strip())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where commands are typed."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass(frozen=True)
class Typed:
    """One run of notebook 03, typed in ``box``."""

    box: Path
    done: subprocess.CompletedProcess[bytes]

    @property
    def outputs(self) -> Path:
        return self.box / "out" / "fma_small"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Typed:
    """Notebook 03 with relative folders, in a shell that has set a matplotlib backend without pictures."""
    box = tmp_path_factory.mktemp("box")
    write_png_tree(box / "mydata" / "spectrograms" / "fma_small-compact", {"train": 8, "val": 4})
    shell = {"FMA_NB_DATA": "mydata", "FMA_NB_OUTPUTS": "out", "MPLBACKEND": "Agg"}
    # A learning rate at which the network dies is a lesson, not an error.
    short = ("-p", "epochs", "1", "-p", "n_seeds", "1", "-p", "lr", "1", "--only", "3")
    return Typed(box, typed_in(box, "-m", "fma_nb", "run", *SMALL, *short, **shell))


# ----- a run -----


def test_relative_folders_mean_the_place_where_the_command_was_typed(run: Typed) -> None:
    assert run.done.returncode == 0, run.done.stderr
    assert run.done.stdout.decode().splitlines()[-1].startswith("Done. Open out/fma_small/report/index.html ")
    assert (run.outputs / "metrics" / "baseline.json").exists()
    assert "baseline CNN" in (run.outputs / "report" / "index.html").read_text()
    assert not (project_root() / "notebooks" / "out").exists()


def test_a_headless_run_has_its_pictures(run: Typed) -> None:
    executed = (run.outputs / "notebooks" / "03_baseline.ipynb").read_text()
    assert executed.count('"image/png": "') == 4


def test_metrics_of_other_data_are_refused_also_by_an_optimized_python(run: Typed) -> None:
    code = """
from pathlib import Path
from fma_nb.bulk.pack import load_pack
from fma_nb.project import FmaNbError
from fma_nb.runs.experiment import read_metrics
print(list(read_metrics("fma_small", ["baseline"], load_pack("fma_small", "compact"))))
next(Path("mydata").rglob("train/Rock/*.png")).unlink()
try:
    read_metrics("fma_small", ["baseline"], load_pack("fma_small", "compact"))
except FmaNbError as error:
    print(error)
"""
    named = {"FMA_NB_DATA": "mydata", "FMA_NB_OUTPUTS": "out", "PYTHONOPTIMIZE": "1"}
    lines = typed_in(run.box, "-c", code, **named).stdout.decode().splitlines()
    assert "['baseline']" in lines
    assert_one_sentence(FmaNbError(lines[-1]), "baseline.json", "other spectrograms")


# ----- folders -----


def test_a_tilde_is_the_home_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here / "home"))
    monkeypatch.setenv("FMA_NB_DATA", "~/fma")
    monkeypatch.setenv("FMA_NB_OUTPUTS", "~nobody-has-this-name/out")
    assert data_dir() == here / "home" / "fma"
    with pytest.raises(FmaNbError) as caught:
        outputs_dir()
    assert_one_sentence(caught.value, "~nobody-has-this-name/out")


def test_a_kernel_that_runs_elsewhere_finds_the_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As nbval, JupyterLab and other runners start it: in the folder of the notebook."""
    monkeypatch.setenv("PWD", str(here))
    monkeypatch.setenv("FMA_NB_DATA", "mydata")
    printed: list[dict[str, Any]] = []
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(project_root() / "notebooks"))
    client.execute_interactive(
        "from fma_nb.project import data_dir; print(data_dir())", output_hook=printed.append, timeout=300
    )
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    texts = [message["content"]["text"] for message in printed if message["msg_type"] == "stream"]
    assert "".join(texts) == f"{here / 'mydata'}\n"


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("first", [True, False])
def test_folders_can_be_named_in_the_command(
    here: Path, capsys: pytest.CaptureFixture[str], first: bool
) -> None:
    named, command = ("--data", "elsewhere", "--outputs", "out"), ("run", *SMALL, "--only", "03")
    arguments = (*named, *command) if first else (*command, *named)
    assert_one_sentence(refusal(capsys, *arguments), here / "elsewhere" / "spectrograms")
    assert outputs_dir() == here / "out"


@pytest.mark.usefixtures("project")
def test_a_song_is_looked_for_where_the_command_was_typed(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_05 = ("run", *SMALL, "--only", "05", "-p", "song")
    assert_one_sentence(refusal(capsys, *run_05, "my.wav"), here / "my.wav", "no such file")
    (here / "my.wav").touch()
    monkeypatch.setenv("HOME", str(here))
    for song in ("my.wav", "~/my.wav"):
        given = {"dataset": "fma_small", "preset": "compact", "run": "fma_small", "device": "cpu"}
        assert _checked_parameters(given | {"song": song})["song"] == str(here / "my.wav")


def test_outputs_that_cannot_be_written_are_one_sentence_before_any_work(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "outputs").write_text("a file where a folder should be")
    assert_one_sentence(refusal(capsys, "run"), project / "outputs", "cannot be written")
    assert not (project / "data").exists()


def test_an_installed_package_keeps_data_in_the_current_folder(tmp_path: Path) -> None:
    site, box = tmp_path / "site", tmp_path / "box"
    box.mkdir()
    (box / "wrong.zip").write_bytes(b"no archive")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(project_root() / "fma_nb", site / "fma_nb", ignore=ignored)
    code = """
from fma_nb.commands.cli import main
assert main(["run"]) == 2
assert main(["download", "metadata", "--archive", "wrong.zip"]) == 2
"""
    done = typed_in(box, "-c", code, PYTHONPATH=str(site))
    no_notebooks, wrong_archive = done.stderr.decode().splitlines()
    assert_one_sentence(FmaNbError(no_notebooks), "clone the project")
    assert "wrong.zip" in wrong_archive
    assert sorted(path.name for path in box.iterdir()) == ["data", "wrong.zip"]
    assert [path.name for path in site.iterdir()] == ["fma_nb"]


# ----- parameters -----


def test_a_learning_rate_with_an_exponent_is_a_number_or_is_explained() -> None:
    assert typed([("lr", "5e-4")], {"lr": float}, "there is none") == {"lr": 5e-4}
    with pytest.raises(FmaNbError) as caught:
        Recipe(lr="5e-4")  # type: ignore[arg-type] # YAML 1.1 makes it a text
    assert_one_sentence(caught.value, "lr='5e-4'", "5.0e-4")


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("only", "named"), [("3", "no spectrograms"), ("03, 4", "no spectrograms"), ("3,7", "--only 3, 7")]
)
def test_notebooks_are_numbers(capsys: pytest.CaptureFixture[str], only: str, named: str) -> None:
    assert_one_sentence(refusal(capsys, "run", *SMALL, "--only", only), named)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert re.fullmatch(r"fma-nb \d+\.\d+\.\d+\n", capsys.readouterr().out)


# ----- predict -----


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a song whose name is no text in any encoding."""
    folder = tmp_path_factory.mktemp("songs")
    sf.write(folder / "a.wav", music(0, 8000, 1, 2), 8000)
    shutil.copy(folder / "a.wav", os.fsdecode(bytes(folder) + b"/\xff\xfe.wav"))
    return folder


def test_a_file_name_in_any_bytes_and_an_output_without_blocks(songs: Path) -> None:
    names = (b"\xff\xfe.wav", b"a.wav")
    done = typed_in(songs, "-m", "fma_nb", "predict", *names, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 * 9 and b"\na.wav\n" in done.stdout
    as_json = typed_in(songs, "-m", "fma_nb", "predict", "--json", *names)
    found = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert [os.fsencode(answer["file"]) for answer in found] == list(names)
    assert found[0]["probabilities"] == found[1]["probabilities"]


def test_a_closed_output_changes_no_exit_status(songs: Path) -> None:
    code = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    done = typed_in(songs, "-c", code, "-m", "fma_nb", "predict", "a.wav")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_full_disk_is_one_sentence(songs: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fma_nb", "predict", str(songs / "a.wav")],
            stdout=full,
            stderr=-1,
        )
    assert done.returncode == 2
    assert done.stderr.decode().splitlines() == ["fma-nb: the output: No space left on device."]


def test_hours_of_music_take_no_more_memory_than_minutes(tmp_path: Path) -> None:
    write_mp3(tmp_path / "minutes.mp3", music(0, 8000, 1, 30), 8000)
    mp3 = (tmp_path / "minutes.mp3").read_bytes()
    (tmp_path / "minutes.mp3").write_bytes(mp3 * 16)  # joined, as streams are
    (tmp_path / "hour.mp3").write_bytes(mp3 * 80)
    code = """
import resource
from fma_nb.commands.predict import load_classifier, predict
for name in ("minutes.mp3", "hour.mp3"):
    predict(name, load_classifier())
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    minutes, hour = map(int, typed_in(tmp_path, "-c", code, OMP_NUM_THREADS="1").stdout.split())
    assert hour < 1.1 * minutes


def test_songs_in_threads_leave_the_process_as_it_is(tmp_path: Path) -> None:
    """Nothing of the process is borrowed, also not for a damaged song, whose decoder likes to complain."""
    mp3 = write_mp3(tmp_path / "a.mp3", music(1, 22_050, 2, 20), 22_050)
    whole = mp3.read_bytes()
    damaged = tmp_path / "b.mp3"
    damaged.write_bytes(whole[: len(whole) // 2] + bytes(3000) + whole[len(whole) // 2 :])
    classifier, before = load_classifier(), os.fstat(2)
    alone = [predict(path, classifier) for path in (mp3, damaged)]
    with ThreadPoolExecutor(2) as pool:
        together = [pool.submit(predict, path, classifier) for path in (mp3, damaged) * 4]
        while not all(one.done() for one in together):
            assert os.path.samestat(os.fstat(2), before)
    assert [one.result() for one in together] == alone * 4
