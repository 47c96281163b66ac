"""A second thread that records gradients while training goes on.

Jobs run one after the other in the order in which they were handed over, so that sums come out the same in
every run. Torch's operations let go of Python's lock, so they run beside training; the random number generators
that training uses, autocast and gradient mode are not touched. A process that forks (data loader workers) waits
until the thread is idle: in the child there is no such thread, and no lock that it might have held.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import NamedTuple, TypeVar

import torch

WAITING_BYTES = 2**27  # of what jobs keep alive; a job that alone takes more waits for all others
MOST_THREADS = 8
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class _Job(NamedTuple):
    future: Future[None]
    nbytes: int
    check: Callable[[], None]


class Background:
    """Runs jobs on a thread of its own, on behalf of one thread that hands them over.

    A job's error is raised in the thread that hands jobs over, at the next call; the jobs behind it do not run.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lightning_influence")
        self._jobs: deque[_Job] = deque()
        self._is_stopped = False
        _watch_forks()
        _ALL.add(self)

    def __reduce__(self) -> tuple[type[Background], tuple[()]]:
        """A copy, of a trainer's callbacks say, has a thread of its own and nothing to do."""
        return Background, ()

    def submit(self, work: Callable[[], None], *, nbytes: int, check: Callable[[], None]) -> None:
        """Hand a job over; waits while too many bytes are kept alive.

        Args:
            work: to be done in the background.
            nbytes: that are kept alive until then.
            check: to be called here once the work is done; raises if it was of no use.

        Raises:
            Exception: whatever an earlier job or its check has raised.
        """
        while self._jobs and (self._jobs[0].future.done() or self._waiting_bytes + nbytes > WAITING_BYTES):
            self._finish_first()
        self._jobs.append(_Job(self._thread.submit(self._run, work), nbytes, check))

    def drain(self) -> None:
        """Wait for all jobs.

        Raises:
            Exception: whatever a job or its check has raised.
        """
        while self._jobs:
            self._finish_first()

    def abandon(self) -> None:
        """Drop what has not begun, and wait for what has; may be called more than once."""
        self._is_stopped = True
        for job in self._jobs:
            job.future.cancel()
        self._wait()
        self._jobs.clear()
        self._is_stopped = False

    def close(self) -> None:
        """Abandon everything and end the thread; may be called more than once."""
        self.abandon()
        self._thread.shutdown()

    @property
    def _waiting_bytes(self) -> int:
        return sum(job.nbytes for job in self._jobs)

    def _run(self, work: Callable[[], None]) -> None:
        if self._is_stopped:
            return
        try:
            with torch.no_grad():
                work()
        except BaseException:
            self._is_stopped = True
            raise

    def _finish_first(self) -> None:
        job = self._jobs[0]
        job.future.result()
        self._jobs.popleft()
        job.check()

    def _wait(self) -> None:
        """Until the thread is idle, whatever becomes of its jobs."""
        for job in list(self._jobs):  # another thread may fork
            if not job.future.cancelled():
                job.future.exception()


_ALL: weakref.WeakSet[Background] = weakref.WeakSet()


def _before_fork() -> None:
    for background in list(_ALL):
        background._wait()


@cache
def _watch_forks() -> None:
    """Wait before whoever has registered earlier: h5py takes its lock then, for which a job may wait."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_before_fork)


def side_by_side(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """`map`, on as many threads as there are cores for while this one waits; results come in the items' order.

    Of the results, which `function` must make independently of one another, few are kept at a time.
    """
    threads = min(MOST_THREADS, usable_threads())
    if threads < 2:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[_Result]] = deque()
        try:
            for item in items:
                if len(waiting) == 2 * threads:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(function, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def usable_threads(processes: int = 1) -> int:
    """How many threads this machine has cores for, each of which runs torch, in each of so many processes."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // (torch.get_num_threads() * processes))
