"""Work spread over processes, and over a Dask cluster: a real scheduler and workers on loopback.

The worker processes import this module: what only the tests need, and takes long, is imported in them.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fma_nb.bulk import workers
from fma_nb.bulk.workers import run_locally, run_on_cluster
from fma_nb.project import FmaNbError

CRASHED = "the decoder crashed on it"
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
Outcomes = dict[tuple[int, ...], str | None]


def jobs(n: int) -> list[tuple[int, ...]]:
    return [(number,) for number in range(n)]


def work(number: int) -> str | None:
    """Hang on 3, crash on 5, want too much memory on 7, refuse the other odd numbers."""
    if number == 3:
        while True:
            pass
    if number == 5:
        os._exit(1)
    if number == 7:
        raise MemoryError
    return "odd" if number % 2 else None


def check_outcomes(outcomes: Outcomes, too_slow: str) -> None:
    assert outcomes.pop((3,)) == too_slow
    assert outcomes.pop((5,)) == CRASHED
    assert outcomes.pop((7,)) == "needs too much memory"
    assert outcomes == {(n,): "odd" if n % 2 else None for n in range(12) if n not in (3, 5, 7)}


@pytest.mark.parametrize("n_workers", [1, 3])
def test_a_clip_that_hangs_crashes_or_wants_too_much_memory_costs_only_itself(n_workers: int) -> None:
    outcomes = dict(run_locally(work, jobs(12), n_workers, cpu_limit_s=0.5))
    check_outcomes(outcomes, "no result within 0.5 s of processor time")


def wait_idly(seconds: float) -> None:
    time.sleep(seconds)


def test_only_processor_time_counts() -> None:
    """A clip that waits for a busy machine is not one that hangs."""
    assert list(run_locally(wait_idly, [(0.5,)] * 3, 1, cpu_limit_s=0.2)) == [((0.5,), None)] * 3


def work_half_the_limit(_number: int) -> None:
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass


def test_each_clip_has_the_whole_limit() -> None:
    assert dict(run_locally(work_half_the_limit, jobs(4), 1, cpu_limit_s=1.0)) == dict.fromkeys(jobs(4))


def add(first: int, second: int) -> str:
    return str(first + second)


def test_a_job_is_a_tuple_of_arguments() -> None:
    assert dict(run_locally(add, [(1, 2), (3, 4)], 2)) == {(1, 2): "3", (3, 4): "7"}
    assert list(run_locally(add, [], 2)) == []


def be_killed_once(number: int, folder: Path) -> None:
    """As the system does when memory runs out: whoever uses it, any process may be the one."""
    with contextlib.suppress(FileExistsError):
        (folder / str(number)).mkdir()
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_clip_whose_process_is_killed_is_tried_again(tmp_path: Path) -> None:
    some = [(n, tmp_path) for n in range(5)]
    assert dict(run_locally(be_killed_once, some, 2)) == dict.fromkeys(some)


def leave_later(number: int) -> None:
    """Finish job 1, then let the process die while it has nothing in hand."""
    if number == 1:
        threading.Timer(0.1, os._exit, [1]).start()


def test_a_process_that_dies_between_two_clips_costs_nothing() -> None:
    def slow_jobs() -> Iterator[tuple[int, ...]]:
        for job in jobs(6):
            time.sleep(0.4)
            yield job

    assert dict(run_locally(leave_later, slow_jobs(), 1)) == dict.fromkeys(jobs(6))


def test_jobs_are_taken_as_they_are_needed() -> None:
    taken = []

    def endless() -> Iterator[tuple[int, ...]]:
        number = 10
        while True:
            number += 2
            taken.append(number)
            yield (number,)

    outcomes = run_locally(work, endless(), 2)
    for n_done in range(1, 20):
        assert next(outcomes)[1] is None
        assert len(taken) <= n_done + 2
    outcomes.close()


def fail_on_4(number: int) -> None:
    if number == 4:
        raise FmaNbError("the disk is full.")
    if number > 4:
        time.sleep(1000)


def test_what_the_work_raises_ends_the_run() -> None:
    outcomes = run_locally(fail_on_4, jobs(20), 3)
    with pytest.raises(FmaNbError, match="the disk is full") as caught:
        list(outcomes)
    assert "in fail_on_4" in "".join(caught.value.__notes__)
    assert not multiprocessing.active_children()


def test_a_caller_that_stops_ends_the_workers() -> None:
    outcomes = run_locally(fail_on_4, [(0,), (5,), (6,)], 2)
    assert next(outcomes) == ((0,), None)
    assert len(multiprocessing.active_children()) == 2
    outcomes.close()
    assert not multiprocessing.active_children()


SCRIPT = """
import os, sys, time
from fma_nb.bulk.workers import run_locally

def hang(number):
    os.write(1, b"%d." % number)
    while number:
        time.sleep(1)
    print("chatter", file=sys.stderr)

def main():
    for job, _ in run_locally(hang, [(0,), (1,), (2,)], 2):
        pass

"""


def start_script(folder: Path, last_line: str) -> subprocess.Popen[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT + last_line)
    return subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_workers_end_with_their_parent(tmp_path: Path, ending: signal.Signals) -> None:
    """They hold the script's output open: it can be read to its end only when they are gone."""
    process = start_script(tmp_path, "if __name__ == '__main__': main()")
    assert process.stdout
    begun = {process.stdout.read(2) for _ in range(3)}
    assert begun == {"0.", "1.", "2."}
    process.send_signal(ending)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -ending
    assert "chatter" not in errors
    assert errors.count("Traceback") == (ending == signal.SIGINT)


def test_ctrl_c_on_the_terminal_is_for_the_parent(tmp_path: Path) -> None:
    process = start_script(tmp_path, "if __name__ == '__main__': main()")
    assert process.stdout
    process.stdout.read(6)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors.count("Traceback") == 1
    assert errors.endswith("KeyboardInterrupt\n")


def test_workers_that_cannot_start_are_one_sentence(tmp_path: Path) -> None:
    process = start_script(tmp_path, "main()")
    _, errors = process.communicate(timeout=60)
    assert "FmaNbError: worker processes cannot start" in errors.splitlines()[-1]


def test_a_worker_imports_only_what_a_clip_needs() -> None:
    code = "import sys, fma_nb.bulk.workers; print({'numpy', 'pandas', 'IPython'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout == "set()\n"


# --- A Dask cluster


def start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dask", *arguments]
    return subprocess.Popen(command, start_new_session=True, **QUIET)


def start_worker(address: str, n_threads: int = 1) -> subprocess.Popen[bytes]:
    return start("worker", address, "--nworkers", "1", "--nthreads", str(n_threads), "--no-dashboard")


def kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for_workers(address: str, n: int) -> None:
    from distributed import Client

    with Client(address, timeout=60) as client:
        client.wait_for_workers(n, timeout=60)


def start_scheduler(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start a scheduler without workers; return its process and its address."""
    told = folder / "scheduler.json"
    process = start(
        "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(told), "--no-dashboard"
    )
    deadline = time.monotonic() + 60
    while not (told.exists() and told.read_text().strip().endswith("}")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    return process, json.loads(told.read_text())["address"]


@pytest.fixture(scope="module", name="scheduler")
def scheduler_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a scheduler without workers."""
    process, address = start_scheduler(tmp_path_factory.mktemp("dask"))
    yield address
    kill(process)


@pytest.fixture(name="two_workers")
def two_workers_fixture(scheduler: str) -> Iterator[list[subprocess.Popen[bytes]]]:
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
    from conftest import tiny_rows
    from test_faults import tiny_copy, tree_hash

    from fma_nb.bulk.spectrograms import make_spectrograms

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


@contextlib.contextmanager
def known_to_the_cluster() -> Iterator[None]:
    """The cluster cannot import this module: a nested function takes it along."""
    import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.usefixtures("two_workers")
def test_a_hanging_and_a_crashing_clip_cost_only_themselves(scheduler: str) -> None:
    def by_value(number: int) -> str | None:
        return work(number)

    with known_to_the_cluster():
        # A busy machine starts workers slowly.
        outcomes = dict(run_on_cluster(by_value, jobs(12), scheduler, timeout_s=20.0))
    check_outcomes(outcomes, "no result within 20 s")


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), OSError("the disk is full"), OSError("/mnt/deserialization/x")]
)
@pytest.mark.usefixtures("two_workers")
def test_what_the_work_raises_on_a_cluster_is_not_taken_for_the_clusters_fault(
    scheduler: str, error: Exception
) -> None:
    def fail(_number: int) -> None:
        raise error

    with known_to_the_cluster(), pytest.raises(type(error), match=str(error)):
        list(run_on_cluster(fail, jobs(1), scheduler))


def test_a_scheduler_that_goes_away_is_one_sentence(tmp_path: Path) -> None:
    from conftest import assert_one_sentence

    process, address = start_scheduler(tmp_path)
    worker = start_worker(address)
    wait_for_workers(address, 1)

    def note_and_hang(_number: int) -> None:
        (tmp_path / "begun").touch()
        time.sleep(1000)

    def wait_and_kill() -> None:
        while not (tmp_path / "begun").exists() and worker.poll() is None:
            time.sleep(0.01)
        kill(process)

    killer = threading.Thread(target=wait_and_kill)
    killer.start()
    try:
        with known_to_the_cluster(), pytest.raises(FmaNbError) as caught:
            list(run_on_cluster(note_and_hang, jobs(3), address))
        assert_one_sentence(caught.value, address, "went away", "run the same command")
    finally:
        kill(worker)
        killer.join()


@pytest.mark.usefixtures("two_workers")
def test_a_cluster_without_the_package_is_one_sentence(scheduler: str) -> None:
    """`work` lives in this module, which the cluster cannot import."""
    from conftest import assert_one_sentence

    with pytest.raises(FmaNbError) as caught:
        dict(run_on_cluster(work, jobs(3), scheduler))
    assert_one_sentence(caught.value, "install the same version")


def test_a_scheduler_without_workers_is_one_sentence(scheduler: str) -> None:
    from conftest import assert_one_sentence

    with pytest.raises(FmaNbError) as caught:
        dict(run_on_cluster(work, jobs(3), scheduler))
    assert_one_sentence(caught.value, "has no workers")


def test_no_scheduler_is_one_sentence(
    project: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from fma_nb.commands.cli import main

    monkeypatch.setattr(workers, "CONNECT_TIMEOUT_S", 1.0)
    shutil.copytree(tiny_data / "raw", project / "data" / "raw")
    assert main(["spectrograms", "--dataset", "fma_small", "--scheduler", "tcp://127.0.0.1:9"]) == 2
    assert "no Dask scheduler answers there" in capfd.readouterr().err
