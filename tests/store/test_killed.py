"""A writer that is killed at any moment leaves the old file or the new one, and nothing in between."""

import os
import random
import signal
import sys
from pathlib import Path
from types import FrameType

import pytest
from store_example import write_file

from lightning_influence import store
from lightning_influence.errors import StoreError
from lightning_influence.store import StoreReader

FOLDER = str(Path(store.__file__).parent)
EARLY, LATE = 12, 20  # moments


class Clock:
    """Counts the lines of the store's code that were run; at one of them it kills the process."""

    def __init__(self, last: int | None = None) -> None:
        self.lines, self.last = 0, last

    def trace(self, frame: FrameType, event: str, _: object) -> object:
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        self.lines += event == "line"
        if self.lines == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.trace


def write_second_segment(path: Path, clock: Clock) -> None:
    sys.settrace(clock.trace)
    try:
        write_file(path, segment=1, after=path)
    finally:
        sys.settrace(None)


def killed_after(lines: int, path: Path) -> bool:
    """Whether a process that writes a second segment was killed at this line."""
    child = os.fork()
    if child == 0:
        try:
            write_second_segment(path, Clock(lines))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_kill_at_any_moment_leaves_a_whole_file_and_the_next_run_works(tmp_path, store_content):
    path, clock = tmp_path / "run.h5", Clock()
    path.write_bytes(store_content)
    write_second_segment(path, clock)
    finished = path.read_bytes()
    # In the last lines the file is marked complete and renamed: all of them.
    early = random.Random(0).sample(range(1, clock.lines - LATE), EARLY)
    found = set()
    for lines in sorted([*early, *range(clock.lines - LATE + 1, clock.lines + 1)]):
        path.write_bytes(store_content)
        assert killed_after(lines, path)
        found.add(path.read_bytes())
        assert path.read_bytes() in (store_content, finished)
        for partial in tmp_path.glob("*.partial"):
            try:
                StoreReader(partial).verify_rows()
            except StoreError:
                continue
            assert partial.read_bytes() == finished
    assert found == {store_content, finished}
    path.write_bytes(store_content)
    write_file(path, segment=1, after=path)
    assert path.read_bytes() == finished
    assert list(tmp_path.iterdir()) == [path]
