"""A second thread for one thread's jobs: order, errors, bounds, forks."""

from __future__ import annotations

import copy
import os
import threading
import time

import h5py
import pytest
import torch

from lightning_influence import background
from lightning_influence.background import Background, side_by_side, usable_threads


def nothing() -> None:
    pass


@pytest.fixture
def worker():
    made = Background()
    yield made
    made.close()


def test_jobs_run_in_order_on_another_thread_without_graphs(worker):
    seen: list[tuple[int, bool, bool]] = []
    here = threading.get_ident()
    for number in range(20):
        worker.submit(
            lambda n=number: seen.append((n, threading.get_ident() != here, torch.is_grad_enabled())),
            nbytes=1,
            check=nothing,
        )
    worker.drain()
    assert seen == [(n, True, False) for n in range(20)]


def fails() -> None:
    raise OSError("disk full")


def test_a_jobs_error_comes_out_at_the_next_call_and_later_jobs_do_not_run(worker):
    seen: list[str] = []
    worker.submit(fails, nbytes=1, check=nothing)
    time.sleep(0.1)
    with pytest.raises(OSError, match="disk full"):
        worker.submit(lambda: seen.append("later"), nbytes=1, check=nothing)
    with pytest.raises(OSError, match="disk full"):
        worker.drain()
    assert not seen
    worker.abandon()
    worker.submit(lambda: seen.append("anew"), nbytes=1, check=nothing)
    worker.drain()
    assert seen == ["anew"]


def test_a_check_runs_here_after_its_job(worker):
    seen: list[object] = []
    worker.submit(lambda: seen.append("work"), nbytes=1, check=lambda: seen.append(threading.get_ident()))
    worker.drain()
    assert seen == ["work", threading.get_ident()]
    worker.submit(nothing, nbytes=1, check=fails)
    with pytest.raises(OSError, match="disk full"):
        worker.drain()


def test_jobs_wait_while_too_many_bytes_are_kept_alive(worker, monkeypatch):
    monkeypatch.setattr(background, "WAITING_BYTES", 100)
    running, most = 0, 0
    lock = threading.Lock()

    def leave() -> None:
        nonlocal running
        time.sleep(0.002)
        with lock:
            running -= 60

    for _ in range(10):
        worker.submit(leave, nbytes=60, check=nothing)
        with lock:
            running += 60
            most = max(most, running)
    worker.drain()
    assert 0 < most <= 100


def test_abandoned_jobs_do_not_run_and_the_running_one_ends(worker):
    is_running, may_end, seen = threading.Event(), threading.Event(), []

    def slow() -> None:
        is_running.set()
        may_end.wait(5)
        seen.append("slow")

    worker.submit(slow, nbytes=1, check=nothing)
    worker.submit(lambda: seen.append("behind"), nbytes=1, check=nothing)
    is_running.wait(5)
    threading.Timer(0.05, may_end.set).start()
    worker.abandon()
    assert seen == ["slow"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_waits_until_the_thread_is_idle(worker):
    seen: list[str] = []
    worker.submit(lambda: (time.sleep(0.1), seen.append("done")), nbytes=1, check=nothing)
    child = os.fork()
    if child == 0:
        os._exit(0 if seen == ["done"] else 1)
    assert os.waitpid(child, 0)[1] == 0
    worker.drain()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_waits_before_h5py_takes_its_lock(worker, tmp_path):
    def write() -> None:
        time.sleep(0.1)
        with h5py.File(tmp_path / "file.h5", "w") as file:
            file["rows"] = 1

    worker.submit(write, nbytes=1, check=nothing)
    child = os.fork()
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    worker.drain()
    assert (tmp_path / "file.h5").exists()


def test_a_copy_has_nothing_to_do_and_a_thread_of_its_own(worker):
    may_end, seen = threading.Event(), []
    worker.submit(lambda: may_end.wait(5), nbytes=1, check=nothing)
    other = copy.deepcopy(worker)
    other.submit(lambda: seen.append("other"), nbytes=1, check=nothing)
    other.close()
    may_end.set()
    assert seen == ["other"]


@pytest.mark.parametrize("threads", [1, 3])
def test_results_side_by_side_come_in_the_items_order(monkeypatch, threads):
    monkeypatch.setattr(background, "usable_threads", lambda: threads)

    def slow_at_first(number: int) -> int:
        time.sleep(0.002 if number < 3 else 0)
        return number**2

    assert list(side_by_side(slow_at_first, range(20))) == [n**2 for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(lambda n: 1 // n, [2, 1, 0, 3]))


def test_threads_are_as_many_as_cores_allow(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert [usable_threads(), usable_threads(2), usable_threads(5)] == [4, 2, 1]
