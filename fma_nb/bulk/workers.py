"""How the work on many clips is spread over the cores of one machine, or over a Dask cluster.

A clip may crash its worker, hang it, or take a whole machine down: that costs this clip at most, never
the run. Both ways call the same function, with a few jobs at a time: memory does not grow with the dataset.
"""

import contextlib
import ctypes
import itertools
import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from multiprocessing.connection import Connection, wait
from typing import Any

from fma_nb.project import FmaNbError

CPU_LIMIT_S = 60.0  # processor time for a job: a busy machine does not use it up
CLIP_TIMEOUT_S = 60.0  # time in which a cluster finishes nothing
CONNECT_TIMEOUT_S = 30.0
AHEAD = 4  # jobs in flight for each worker of a cluster
CRASHED = "the decoder crashed on it"
NO_MEMORY = "needs too much memory"

Job = tuple[Any, ...]
Work = Callable[..., str | None]
Outcomes = Iterator[tuple[Job, str | None]]


def run_locally(work: Work, jobs: Iterable[Job], workers: int, cpu_limit_s: float = CPU_LIMIT_S) -> Outcomes:
    """Call ``work(*job)`` for each job in processes of this machine; yield the jobs as they are done.

    With each job comes ``None``, or the reason why it has to be skipped: what ``work`` returns, or that the
    job exceeds ``cpu_limit_s`` of processor time (0: no limit), needs too much memory or crashes twice. What
    ``work`` raises ends the run. Jobs are taken one by one when one of the ``workers`` is free. These are
    killed when the caller stops early, presses Ctrl-C or dies; `FmaNbError` says that they cannot start.
    """
    crashed = []
    for job, reason in _through_pool(work, jobs, workers, cpu_limit_s):
        if reason == CRASHED:
            crashed.append(job)
        else:
            yield job, reason
    # A crash may be another job's fault, which took all the memory. Now each job runs alone.
    yield from _through_pool(work, crashed, 1, cpu_limit_s)


def _through_pool(work: Work, jobs: Iterable[Job], workers: int, cpu_limit_s: float) -> Outcomes:
    source = iter(jobs)
    pool: list[_Worker] = []
    try:
        while True:
            for job in itertools.islice(source, workers - len(pool)):
                pool.append(_Worker(work, cpu_limit_s))
                pool[-1].take(job)
            if not pool:
                return
            readable = wait([worker.pipe for worker in pool])
            for worker in [worker for worker in pool if worker.pipe in readable]:
                if worker.is_new:
                    with _starting():
                        worker.is_new = worker.pipe.recv()
                    continue
                job, reason = worker.job, worker.outcome()
                following = None if worker.pipe.closed else next(source, None)
                if following is None:
                    worker.end()
                    pool.remove(worker)
                else:
                    worker.take(following)
                yield job, reason
    finally:
        for worker in pool:
            worker.end()


class _Worker:
    """A process that has one job at a time, so that its death tells which job it died of."""

    def __init__(self, work: Work, cpu_limit_s: float) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, its_pipe = spawn.Pipe()
        # When Python exits it ends daemons, but waits for other processes.
        self._process = spawn.Process(target=_serve, args=(its_pipe, work, cpu_limit_s), daemon=True)
        self._cpu_limit_s, self.is_new = cpu_limit_s, True
        with _starting(), its_pipe:
            self._process.start()

    def take(self, job: Job) -> None:
        """Begin a job, or let it wait until the process has started."""
        self.job = job
        with contextlib.suppress(OSError):  # it died just now: the outcome will say so
            self.pipe.send(job)

    def outcome(self) -> str | None:
        """Return why the job has to be skipped, if so, or raise what it raised."""
        try:
            outcome: str | Exception | None = self.pipe.recv()
        except (EOFError, OSError):
            self.end()
            if self._process.exitcode == -signal.SIGPROF:
                return f"no result within {self._cpu_limit_s:g} s of processor time"
            return CRASHED
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self.pipe.close()


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise FmaNbError(
            "worker processes cannot start: use fewer of them if memory is short; in a script of your own, "
            "put the call below 'if __name__ == \"__main__\":'."
        ) from error


def _serve(pipe: Connection, work: Work, cpu_limit_s: float) -> None:
    """Do the jobs that come through the pipe, until this process is ended."""
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the MP3 decoder writes to the terminal
    pipe.send(False)  # no longer new
    while True:
        job = pipe.recv()
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)  # its signal ends the process, wherever it hangs
        try:
            outcome: str | Exception | None = work(*job)
        except MemoryError:
            outcome = NO_MEMORY
        except Exception as error:  # the caller handles it
            error.add_note(traceback.format_exc())  # the traceback itself does not go through the pipe
            outcome = error
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send(outcome)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def keep_freed_memory() -> None:
    """Let this process reuse the memory that it frees instead of returning it to the system (glibc only).

    Every clip and every batch needs arrays of megabytes. To fetch their pages anew each time costs a tenth
    of the time of a spectrogram and up to a third of a training step on the CPU.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX in <malloc.h>
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def run_on_cluster(
    work: Work,
    jobs: Iterable[Job],
    scheduler: str,
    timeout_s: float | None = CLIP_TIMEOUT_S,
    *,
    one_thread: bool = False,
) -> Outcomes:
    """Do as `run_locally` does, on the workers of a Dask scheduler, for example ``tcp://10.0.0.1:8786``.

    Scheduler and workers need this package, and the workers must see the same files under the same paths.
    Workers may join, leave and die: Dask gives what they had in hand to the others. When nothing is finished
    within ``timeout_s``, what they have in hand is given up; ``None`` never gives up. With ``one_thread`` a
    worker that would run two jobs at a time in one process is refused: they would share its random state.
    `FmaNbError` tells of Dask, a scheduler, workers or the package that are not there, or no longer.
    """
    call = (_on_one_thread, work) if one_thread else (work,)
    waiting: dict[Any, Job] = {}
    finished: list[tuple[Any, str | None]] = []
    source = iter(jobs)
    with _connected(scheduler) as client:
        while True:
            n_threads = sum(client.nthreads().values())
            if not n_threads and not finished:
                raise FmaNbError(
                    f"--scheduler {scheduler} has no workers: start some with "
                    f"'dask worker {scheduler} --nthreads 1', then run the same command again."
                )
            for job in itertools.islice(source, max(0, AHEAD * max(1, n_threads) - len(waiting))):
                waiting[client.submit(*call, *job, pure=False)] = job
            if not waiting:
                return
            finished = _finished(client, list(waiting), timeout_s)
            for future, reason in finished:
                yield waiting.pop(future), reason


@contextlib.contextmanager
def _connected(scheduler: str) -> Iterator[Any]:
    try:
        from distributed import Client
    except ImportError as error:
        raise FmaNbError("--scheduler needs Dask: install it with pip install 'fma-nb[cluster]'.") from error
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # what there is to say is said here
    try:
        client = Client(scheduler, timeout=CONNECT_TIMEOUT_S)
    except (OSError, ValueError) as error:
        raise FmaNbError(f"--scheduler {scheduler}: no Dask scheduler answers there.") from error
    with client:
        try:
            yield client
        except (CancelledError, OSError) as error:
            if isinstance(error, OSError) and client.status == "running":
                raise  # of the work itself
            raise FmaNbError(
                f"--scheduler {scheduler} went away: start it and its workers again, then run the same "
                "command, which goes on from here."
            ) from error


def _on_one_thread(work: Work, *job: Any) -> str | None:
    from distributed import get_worker

    if get_worker().state.nthreads > 1:
        raise FmaNbError(
            "--scheduler: a worker has more than one thread, and trainings in one process would disturb each "
            "other: start every 'dask worker' with --nthreads 1, then run the same command again."
        )
    return work(*job)


def _finished(client: Any, futures: list[Any], timeout_s: float | None) -> list[tuple[Any, str | None]]:
    """Wait for jobs that are done. When there is none for too long, restart the workers that are at work."""
    from distributed import wait

    with contextlib.suppress(TimeoutError):
        wait(futures, timeout=timeout_s or CLIP_TIMEOUT_S, return_when="FIRST_COMPLETED")
    done = [(future, _outcome(future)) for future in futures if future.done()]
    if done or timeout_s is None:
        return done
    in_hand: dict[str, list[str]] = client.run(
        lambda dask_worker: [task.key for task in dask_worker.state.executing], on_error="ignore"
    )
    hanging = [future for future in futures if any(future.key in keys for keys in in_hand.values())]
    client.cancel(hanging, force=True)
    client.restart_workers([address for address, keys in in_hand.items() if keys], raise_for_error=False)
    return [(future, f"no result within {timeout_s:g} s") for future in hanging]


def _outcome(future: Any) -> str | None:
    from distributed.scheduler import KilledWorker

    error = future.exception()
    if isinstance(error, KilledWorker):
        return CRASHED
    if isinstance(error, MemoryError):
        return NO_MEMORY
    if isinstance(error, ImportError) or (type(error) is RuntimeError and "deserialization" in str(error)):
        raise FmaNbError(
            "the cluster cannot load this package: install the same version of fma-nb on its scheduler "
            "and its workers, then run the same command again."
        ) from error
    return future.result()
