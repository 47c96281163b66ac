"""Processes of their own for runs that may hang: with a time limit, and without survivors.

Each has a session of its own, which ends with it as a whole: ranks whose parent is gone would wait for each
other for half an hour. It also ends when the process that started it does. What they print goes into a file,
for a pipe stays open as long as one survivor has it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

SECONDS = 240.0  # that a run may take on a busy machine before it counts as hanging


def run_forked(target: Callable[[], object], output: Path, seconds: float = SECONDS) -> int:
    """Call a function in a copy of this process; its exit code.

    Raises:
        TimeoutError: if there is no end to it.
    """
    process = multiprocessing.get_context("fork").Process(target=_in_a_session, args=(target, output, os.getpid()))
    process.start()
    assert process.pid is not None
    try:
        process.join(seconds)
        code = process.exitcode
    finally:
        _end_session(process.pid)
    process.join()
    return _checked(code, output, seconds)


def run_command(command: Sequence[str], output: Path, seconds: float = SECONDS) -> int:
    """Run a command that calls `end_with_parent` by itself; its exit code.

    Raises:
        TimeoutError: if there is no end to it.
    """
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    code: int | None = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(seconds)
    finally:
        _end_session(process.pid)
    process.wait()
    return _checked(code, output, seconds)


def end_with_parent(parent: int) -> None:
    """Let this process's group end once the process that started it is gone, which it may be already."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _in_a_session(target: Callable[[], object], output: Path, parent: int) -> None:
    os.setsid()
    end_with_parent(parent)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    target()


def _end_session(leader: int) -> None:
    """Also of those whose leader is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _checked(code: int | None, output: Path, seconds: float) -> int:
    if code is None:
        raise TimeoutError(f"training did not end within {seconds:.0f} seconds: {tail_of(output)}")
    return code


def tail_of(output: Path) -> str:
    """The last of what was printed."""
    return output.read_text(errors="replace")[-1500:]
