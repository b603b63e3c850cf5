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

    Two jobs wait for each of the others at most, and no more than MOST_WAITING bytes of what `weigh` says of them, so
    what is read ahead does not grow with the input. `preload` names the module whose import they share.
    """
    queue = iter(jobs)
    head = list(islice(queue, 2))
    beside = _Beside(processes - 1, preload) if processes > 1 and len(head) > 1 else None
    waiting: deque[_Waiting[Result]] = deque()
    reuse_memory()
    try:
        for job in chain(head, queue):
            size = weigh(*job)
            if beside is not None and beside.free(waiting, size):
                waiting.append(_Waiting(beside.pool.submit(work, *job), size))
            else:
                waiting.append(_Waiting(_done(work(*job)), 0))
            while waiting and waiting[0].future.done():
                yield _result(waiting.popleft().future)
        while waiting:
            yield _result(waiting.popleft().future)
    finally:
        if beside is not None:
            beside.close()


@dataclass(frozen=True)
class _Waiting(Generic[Result]):
    future: Future[Result]
    bytes: int


class _Beside:
    """The other processes. Until they are up, the one that deals does all the work."""

    def __init__(self, number: int, preload: str) -> None:
        context = server(preload)
        self.number = number
        self.pool = ProcessPoolExecutor(number, mp_context=context, initializer=leave_with, initargs=(os.getpid(),))
        self._starting = ThreadPoolExecutor(1)
        self._up = self._starting.submit(lambda: self.pool.submit(os.getpid).result())

    def free(self, waiting: Iterable[_Waiting[Any]], size: int) -> bool:
        """Whether one more job would find a process, now or when it is done with the one at hand, and memory."""
        if not self._up.done():
            return False
        _result(self._up)  # a process that was killed at its start must not go unnoticed
        ahead = [job.bytes for job in waiting if not job.future.done()]
        return len(ahead) < 2 * self.number and (not ahead or sum(ahead) + size <= MOST_WAITING)

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self._starting.shutdown(wait=True)


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


def _done(result: Result) -> Future[Result]:
    future: Future[Result] = Future()
    future.set_result(result)
    return future


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
