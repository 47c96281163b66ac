"""One thread a test process: two processes share two cores. And what a user is shown."""

import logging
from collections.abc import Callable, Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What Lightning's loggers show to a user."""
    shown = logging.getLogger("lightning.pytorch")
    shown.addHandler(caplog.handler)
    for name in (shown.name, f"{shown.name}.utilities.rank_zero"):
        caplog.set_level(logging.INFO, logger=name)  # whatever scripts have made of it
    yield lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.INFO]
    shown.removeHandler(caplog.handler)
