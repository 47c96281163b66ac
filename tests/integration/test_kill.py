"""`kill -9` at random moments of capture: a file at its final name is always a whole one.

Every run is killed in the same folder, so that each has to work beside what the ones before it left. Epochs
are captured in turn and are short: a large share of the time goes into laying out, finishing and replacing
files, which is where the kills are wanted.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import TensorDataset

from lightning_influence import InfluenceCallback
from lightning_influence.errors import StoreError, StoreNotFoundError
from lightning_influence.store import StoreReader
from tests.integration.models import Task, train
from tests.matrix.measuring import segments

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="forks and kills")]
N, WIDTH = 256, 48
KILLS, LONGEST = 50, 0.8  # seconds after the first batch
PATIENCE = 120.0  # seconds until then
KINDS: list[dict[str, Any]] = [{"codec": "pairs"}, {"codec": "eigen"}, {"codec": "pairs", "epochs": "every"}]


class SaysWhenItStarts(Callback):
    """After the first batch."""

    def __init__(self, sender: Connection) -> None:
        self.sender: Connection | None = sender

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        if self.sender is not None:
            self.sender.send_bytes(b"1")
            self.sender = None


def capture(path: Path, kind: dict[str, Any], *callbacks: Callback, **options: Any) -> None:
    """Train with capture of every epoch, without an end in sight unless `options` say so."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(N, WIDTH, generator=generator), torch.randint(0, 3, (N,), generator=generator)
    )
    model = Task(net, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01))
    callback = InfluenceCallback(path, on_error="raise", **kind)
    # A limit of steps makes every epoch one that may be the last.
    endless = {"max_epochs": -1, "max_steps": 10**6}
    train(model, data, callback, *callbacks, batch_size=64, **{**endless, **options})


def in_child(path: Path, kind: dict[str, Any], sender: Connection) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    capture(path, kind, SaysWhenItStarts(sender))


def kill_after(delay: float, path: Path, kind: dict[str, Any]) -> None:
    """Start a run, and kill it some seconds after its first batch."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=in_child, args=(path, kind, sender))
    child.start()
    sender.close()
    try:
        assert receiver.poll(PATIENCE), "no first batch"
        receiver.recv_bytes()  # EOFError: it ended before its first batch
        time.sleep(delay)
    finally:
        child.kill()
        child.join()
    assert child.exitcode == -signal.SIGKILL  # it had not ended by itself
    receiver.close()


def assert_whole(reader: StoreReader) -> None:
    """Every byte is as its checksum says, every number of rows as the flags say, every factor a number."""
    for each in segments(reader):
        each.verify_rows()
        written, valid = (each.column(name).astype(bool) for name in ("written", "valid"))
        counts = (written.sum(), (~written).sum(), (written & ~valid).sum())
        assert counts == tuple(each.attributes[f"rows_{name}"] for name in ("written", "missing", "invalid"))
        assert counts == (N, 0, 0)
        for layer in each.layers:
            assert all(np.isfinite(array).all() for array in each.factors(layer).values())
    assert reader.document("layers")


def opens(path: Path) -> bool:
    """Whether the file passes for a complete one; then it has to be."""
    try:
        reader = StoreReader(path)
    except StoreNotFoundError:
        return False
    except StoreError:
        assert path.suffix == ".partial", f"{path} is damaged"
        return False
    assert_whole(reader)
    return True


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: ", ".join(map(str, kind.values())))
def test_killed_runs_leave_whole_files_or_none_and_the_next_run_works(
    kind: dict[str, Any], tmp_path: Path
) -> None:
    path, moments = tmp_path / "influence.h5", random.Random(20)
    kills = KILLS // len(KINDS) + 1
    found = []
    for _ in range(kills):
        kill_after(moments.uniform(0, LONGEST), path, kind)
        found.append(opens(path))
        for leftover in tmp_path.glob("*.partial"):
            opens(leftover)
    assert any(found)  # files were finished, and replaced by later runs

    leftovers = sorted(each.name for each in tmp_path.iterdir() if each != path)
    before = StoreReader(path).store_id
    capture(path, kind, max_steps=-1, max_epochs=2)
    assert opens(path)
    assert StoreReader(path).store_id != before
    assert sorted(each.name for each in tmp_path.iterdir() if each != path) == leftovers  # they do not disturb
    print(f"{kills} kills, {len(leftovers)} leftovers: {sorted({name.rpartition('.')[2] for name in leftovers})}")
