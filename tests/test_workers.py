"""Work spread over processes, and over a Dask cluster: a real scheduler and workers on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest
from conftest import assert_one_sentence, tiny_rows
from test_faults import tiny_copy, tree_hash

from fma_nb import workers
from fma_nb.cli import main
from fma_nb.project import FmaNbError
from fma_nb.spectrogram import make_spectrograms

QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dask", *arguments]
    return subprocess.Popen(command, start_new_session=True, **QUIET)


def start_worker(address: str) -> subprocess.Popen[bytes]:
    return start("worker", address, "--nworkers", "1", "--nthreads", "1", "--no-dashboard")


def kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for_workers(address: str, n: int) -> None:
    from distributed import Client

    with Client(address, timeout=60) as client:
        client.wait_for_workers(n, timeout=60)


def work(item: int) -> str | None:
    """Hang on 3, crash on 5, refuse the other odd numbers."""
    if item == 3:
        time.sleep(1000)
    if item == 5:
        os._exit(1)
    return "odd" if item % 2 else None


def check_outcomes(outcomes: dict[int, str | None]) -> None:
    assert outcomes.pop(3) == "no result within 4 s"
    assert outcomes.pop(5) == "the decoder crashed on it"
    assert outcomes == {i: "odd" if i % 2 else None for i in range(12) if i not in (3, 5)}


def test_local_processes_lose_only_what_hangs_and_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CLIP_TIMEOUT_S", 4.0)
    check_outcomes(dict(workers.run_locally(work, range(12), 2)))


def leave_later(item: int) -> str | None:
    """Finish item 1, then let the process die while it has nothing in hand."""
    if item == 1:
        threading.Timer(0.1, os._exit, [1]).start()
    return None


def test_a_process_that_dies_between_two_clips_costs_nothing() -> None:
    def slow_items() -> Iterator[int]:
        for item in range(10):
            time.sleep(0.4)
            yield item

    outcomes = list(workers.run_locally(leave_later, slow_items(), 1))
    assert sorted(outcomes) == [(i, None) for i in range(10)]


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a scheduler without workers."""
    told = tmp_path_factory.mktemp("dask") / "scheduler.json"
    process = start(
        "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(told), "--no-dashboard"
    )
    deadline = time.monotonic() + 60
    while not (told.exists() and told.read_text().strip().endswith("}")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    yield json.loads(told.read_text())["address"]
    kill(process)


@pytest.fixture
def two_workers(scheduler: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = [start_worker(scheduler) for _ in range(2)]
    wait_for_workers(scheduler, 2)
    yield processes
    for process in processes:
        kill(process)
    time.sleep(1)  # the scheduler notices


def test_a_worker_is_killed_in_the_middle_and_every_png_is_there_once(
    project: Path,
    tiny_data: Path,
    scheduler: str,
    two_workers: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    undisturbed = tiny_copy(tiny_data, project / "calm")
    monkeypatch.setenv("FMA_NB_DATA", str(project / "calm"))
    make_spectrograms("fma_small", "compact", workers=2, progress=False)

    tree = tiny_copy(tiny_data, project / "data")
    monkeypatch.setenv("FMA_NB_DATA", str(project / "data"))
    command = [sys.executable, "-m", "fma_nb", "spectrograms", "--dataset", "fma_small"]
    run = subprocess.Popen([*command, "--scheduler", scheduler], stdout=subprocess.PIPE, text=True)
    while run.poll() is None and len(list(tree.rglob("*.png"))) < 5:
        time.sleep(0.01)
    n_when_killed = len(list(tree.rglob("*.png")))
    kill(two_workers[0])
    printed, _ = run.communicate()
    assert run.returncode == 0
    assert "0 clips were skipped." in printed
    assert n_when_killed < len(tiny_rows()), "the worker was killed too late to prove anything"
    assert tree_hash(tree, "*.png") == tree_hash(undisturbed, "*.png")
    assert len(list(tree.rglob("*.png"))) == len(tiny_rows())
    assert not list(tree.rglob("*.tmp"))


@pytest.mark.usefixtures("two_workers")
def test_a_hanging_and_a_crashing_clip_cost_only_themselves(
    scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "CLIP_TIMEOUT_S", 4.0)

    def by_value(item: int) -> str | None:
        return work(item)

    # The cluster cannot import this module: a nested function takes it along.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        check_outcomes(dict(workers.run_on_cluster(by_value, range(12), scheduler)))
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.usefixtures("two_workers")
def test_a_cluster_without_the_package_is_one_sentence(scheduler: str) -> None:
    """`work` lives in this module, which the cluster cannot import."""
    with pytest.raises(FmaNbError) as caught:
        dict(workers.run_on_cluster(work, range(3), scheduler))
    assert_one_sentence(caught.value, "install the same version")


def test_a_scheduler_without_workers_is_one_sentence(project: Path, tiny_data: Path, scheduler: str) -> None:
    tiny_copy(tiny_data, project / "data")
    with pytest.raises(FmaNbError) as caught:
        make_spectrograms("fma_small", "compact", scheduler=scheduler, progress=False)
    assert_one_sentence(caught.value, "has no workers")


def test_no_scheduler_is_one_sentence(
    project: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "CONNECT_TIMEOUT_S", 1.0)
    shutil.copytree(tiny_data / "raw", project / "data" / "raw")
    assert main(["spectrograms", "--dataset", "fma_small", "--scheduler", "tcp://127.0.0.1:9"]) == 2
    assert "no Dask scheduler answers there" in capfd.readouterr().err
