"""Work dealt out to processes, its results in order: the one that deals works too."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from typing import Any, Generic, TypeVar

from mmit.data.images import reuse_memory
from mmit.data.sample import SampleError

Result = TypeVar("Result")

MOST_WAITING = 2**30
"""Bytes of jobs that wait, but that one may always."""
SELDOM = 50_000
"""Objects made between two searches for cycles among them. Rows hold none, and searching each 700 took 7 % of the time
of a conversion."""
COMMAND = "typer"
"""Imported once for all: each process runs the script of the command again, and this is what takes time in it."""


def cpus() -> int:
    """Those this process may use: a job on a cluster has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def in_order(
    work: Callable[..., Result],
    jobs: Iterable[tuple[Any, ...]],
    processes: int,
    *,
    preload: str,
    weigh: Callable[..., int] = lambda *job: 0,
) -> Iterator[Result]:
    """What `work` makes of each job, in their order, by this process and `processes` - 1 beside it.

    What is read ahead does not grow with the input; `weigh` tells the bytes of a job. `preload` names the module whose
    import the processes share.
    """
    queue = iter(jobs)
    head = list(islice(queue, 2))
    with Team[Result](processes if len(head) > 1 else 1, preload) as team:
        for job in chain(head, queue):
            team.give(work, *job, size=weigh(*job))
            yield from team.ready()
        yield from team.rest()


class Team(Generic[Result]):
    """This process and `processes` - 1 beside it, which begin when it is first asked whether one of them is free.

    Two jobs wait for each of the others at most, and no more than MOST_WAITING bytes of them. Until the others are up,
    the one that deals does all the work.
    """

    def __init__(self, processes: int, preload: str) -> None:
        self.beside = processes - 1
        self.preload = preload
        self._waiting: deque[_Waiting[Result]] = deque()
        self._pool: ProcessPoolExecutor | None = None
        self._starting = ThreadPoolExecutor(1)
        self._up: Future[int]
        self._collecting = gc.get_threshold()
        reuse_memory()

    def __enter__(self) -> Team[Result]:
        gc.set_threshold(SELDOM, *self._collecting[1:])
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the other processes when each is done with the job at hand; what waits is not begun."""
        gc.set_threshold(*self._collecting)
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._starting.shutdown(wait=True)

    def free(self, size: int = 0) -> bool:
        """Whether one more job, of so many bytes, would find a process now or when it is done with the one at hand."""
        if self.beside < 1:
            return False
        if self._pool is None:
            self._pool = pool = ProcessPoolExecutor(
                self.beside, mp_context=server(self.preload), initializer=leave_with, initargs=(os.getpid(),)
            )
            self._up = self._starting.submit(lambda: pool.submit(os.getpid).result())
        if not self._up.done():
            return False
        _result(self._up)  # a process that was killed at its start must not go unnoticed
        ahead = [job.bytes for job in self._waiting if not job.future.done()]
        return len(ahead) < 2 * self.beside and (not ahead or sum(ahead) + size <= MOST_WAITING)

    def give(self, work: Callable[..., Result], *job: Any, size: int = 0) -> None:
        """A job to a process that is free, else done here and now."""
        if self.free(size):
            assert self._pool is not None
            self._waiting.append(_Waiting(self._pool.submit(work, *job), size))
        else:
            done: Future[Result] = Future()
            done.set_result(work(*job))
            self._waiting.append(_Waiting(done, 0))

    def ready(self) -> Iterator[Result]:
        """The results that follow in the order of the jobs, as far as they are there."""
        while self._waiting and self._waiting[0].future.done():
            yield _result(self._waiting.popleft().future)

    def rest(self) -> Iterator[Result]:
        """All results that are still to come."""
        while self._waiting:
            yield _result(self._waiting.popleft().future)


@dataclass(frozen=True)
class _Waiting(Generic[Result]):
    future: Future[Result]
    bytes: int


def server(module: str) -> ForkServerContext:
    """Where processes come from that have imported the module, which begins here and is not waited for.

    Ctrl-C while it does so prints no traceback of its own.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module, COMMAND])
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            ensure_running()
        finally:
            signal.signal(signal.SIGINT, before)
    return context


def _result(future: Future[Result]) -> Result:
    try:
        return future.result()
    except BrokenProcessPool:
        raise SampleError(
            "a worker process was killed, most likely for want of memory; give the same command with fewer "
            "--processes, or convert with fewer --rows-per-shard: what is finished is kept"
        ) from None


def leave_with(dealing: int) -> None:
    """Ends this process when the one that deals is gone: a killed conversion leaves nothing running."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # what it has written has no name yet
    gc.freeze()  # the libraries' objects stay; looking through them again and again took a fifth of the time
    reuse_memory()

    def watch() -> None:
        with suppress(ProcessLookupError):
            while True:
                os.kill(dealing, 0)
                time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
