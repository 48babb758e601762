"""How the work on many clips is spread over the cores of one machine, or over a Dask cluster.

A clip may crash its worker, hang it, or take a whole machine down: that costs this clip at most, never
the run. Both ways call the same function on the same items, a few at a time, so that memory does not
grow with the dataset.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, Generic, TypeVar

import pebble

from fma_nb.project import FmaNbError, keep_freed_memory

CLIP_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 30.0
CRASHED = "the decoder crashed on it"
MAX_POOLS = 5
AHEAD = 4  # items in flight for each worker

Item = TypeVar("Item")
Work = Callable[[Item], str | None]
Outcomes = Iterator[tuple[Item, str | None]]


def run_locally(work: Work[Item], items: Iterable[Item], workers: int) -> Outcomes[Item]:
    """Call ``work`` on every item in processes of this machine; yield each item as it is done.

    Parameters
    ----------
    work
        A function of one item that returns ``None``, or the reason why the item has to be skipped.
    items
        What to work on.
    workers
        Number of processes, a core each.

    Yields
    ------
    item, reason
        In the order in which they finish. Items that hang their process, or crash it twice (once may be
        somebody else's fault), have a reason, too.
    """
    queue = _Queue(items)
    _shorten_lock_timeout()
    for _ in range(MAX_POOLS):
        with (
            contextlib.suppress(BrokenProcessPool),
            pebble.ProcessPool(workers, context=get_context("spawn"), initializer=_prepare) as pool,
        ):
            yield from _through_pool(pool, work, queue, AHEAD * workers)
            return
    raise FmaNbError(f"worker processes keep dying ({MAX_POOLS} pools of {workers}): is there enough memory?")


class _Queue(Generic[Item]):
    """Items to work on; those put back come next."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = iter(items)
        self._crashed: list[Item] = []

    def take(self, n: int) -> Iterator[Item]:
        return itertools.islice(self._items, n)

    def put_back(self, items: Iterable[Item]) -> None:
        self._items = itertools.chain(list(items), self._items)

    def crashed_before(self, item: Item) -> bool:
        self._crashed.append(item)
        return self._crashed.count(item) > 1


def _through_pool(
    pool: pebble.ProcessPool, work: Work[Item], queue: _Queue[Item], limit: int
) -> Outcomes[Item]:
    """Work off the queue; when a worker's death breaks the pool, put back what was in hand and raise."""
    waiting: dict[Future[str | None], Item] = {}
    try:
        while True:
            for item in list(queue.take(limit - len(waiting))):
                waiting[_schedule(pool, work, item)] = item
            if not waiting:
                return
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                reason = _local_outcome(future)
                item = waiting.pop(future)
                if reason == CRASHED and not queue.crashed_before(item):
                    queue.put_back([item])
                else:
                    yield item, reason
    except BrokenProcessPool:
        queue.put_back(waiting.values())
        raise


def _schedule(pool: pebble.ProcessPool, work: Work[Item], item: Item) -> Future[str | None]:
    try:
        future: Future[str | None] = pool.schedule(work, args=(item,), timeout=CLIP_TIMEOUT_S)
    except RuntimeError as error:  # a broken pool takes no more work
        future = Future()
        future.set_exception(BrokenProcessPool(str(error)))
    return future


def _prepare() -> None:
    """Prepare a worker: no C-level chatter of the MP3 decoder on the terminal."""
    keep_freed_memory()
    _shorten_lock_timeout()
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _shorten_lock_timeout() -> None:
    """Take a lock of the pool for that of a dead worker after 5 s instead of a minute."""
    pebble.CONSTS.channel_lock_timeout = 5


def _local_outcome(future: Future[str | None]) -> str | None:
    try:
        return future.result()
    except TimeoutError:
        return _too_slow()
    except pebble.ProcessExpired:
        return CRASHED
    except MemoryError:
        return "needs too much memory"


def _too_slow() -> str:
    return f"no result within {CLIP_TIMEOUT_S:.0f} s"


def run_on_cluster(work: Work[Item], items: Iterable[Item], scheduler: str) -> Outcomes[Item]:
    """Do as `run_locally` does, on the workers of a Dask scheduler, for example ``tcp://10.0.0.1:8786``.

    Scheduler and workers need this package, and the workers must see the same files under the same
    paths. Workers may join, leave and die while it runs: Dask gives what they had in hand to the others.

    Raises
    ------
    FmaNbError
        When Dask is not installed, the scheduler does not answer, it has no workers, or the package is
        missing there.
    """
    with _connected(scheduler) as client:
        waiting: dict[Any, Item] = {}
        source = iter(items)
        while True:
            room = AHEAD * max(1, sum(client.nthreads().values())) - len(waiting)
            for item in itertools.islice(source, max(0, room)):
                waiting[client.submit(work, item, pure=False)] = item
            if not waiting:
                return
            for future, reason in _finished_on_cluster(client, list(waiting), scheduler):
                yield waiting.pop(future), reason


@contextlib.contextmanager
def _connected(scheduler: str) -> Iterator[Any]:
    try:
        from distributed import Client
    except ImportError as error:
        raise FmaNbError("--scheduler needs Dask: install it with pip install 'fma-nb[cluster]'.") from error
    try:
        client = Client(scheduler, timeout=CONNECT_TIMEOUT_S)
    except (OSError, TimeoutError, ValueError) as error:
        raise FmaNbError(f"--scheduler {scheduler}: no Dask scheduler answers there.") from error
    with client:
        if not client.nthreads():
            raise _no_workers(scheduler)
        yield client


def _no_workers(scheduler: str) -> FmaNbError:
    return FmaNbError(
        f"--scheduler {scheduler} has no workers: start some with 'dask worker {scheduler} --nthreads 1', "
        "then run the same command again."
    )


def _finished_on_cluster(client: Any, futures: list[Any], scheduler: str) -> list[tuple[Any, str | None]]:
    """Wait until something is done; give up what hangs once nothing has moved for the time limit."""
    from distributed import wait

    try:
        done = wait(futures, timeout=CLIP_TIMEOUT_S, return_when="FIRST_COMPLETED").done
    except TimeoutError:
        return _abandon_hanging(client, futures, scheduler)
    return [(future, _cluster_outcome(future)) for future in done]


def _abandon_hanging(client: Any, futures: list[Any], scheduler: str) -> list[tuple[Any, str | None]]:
    """Restart the workers whose clip hangs; return these clips' futures with the reason."""
    if not client.nthreads():
        raise _no_workers(scheduler)
    executing: dict[str, list[str]] = client.run(_keys_in_hand, on_error="ignore")
    hanging = [f for f in futures if any(f.key in keys for keys in executing.values())]
    client.cancel(hanging, force=True)
    client.restart_workers([address for address, keys in executing.items() if keys], raise_for_error=False)
    return [(future, _too_slow()) for future in hanging]


def _keys_in_hand(dask_worker: Any) -> list[str]:
    return [task.key for task in dask_worker.state.executing]


def _cluster_outcome(future: Any) -> str | None:
    from distributed.scheduler import KilledWorker

    try:
        reason: str | None = future.result()
        return reason
    except KilledWorker:
        return CRASHED
    except MemoryError:
        return "needs too much memory"
    except (ImportError, RuntimeError) as error:  # the latter from a scheduler that lacks the package
        raise FmaNbError(
            "the cluster cannot load this package: install the same version of fma-nb on its scheduler "
            "and its workers, then run the same command again."
        ) from error
