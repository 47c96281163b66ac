"""`torch.compile` of the module, of a submodule and in place: captured batches run eagerly, all others do not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.store import StoreReader
from tests.integration.models import Task, seeded, train, vector_data
from tests.matrix.running import digest
from tests.matrix.situation import MOVING, Net

Compiler = Callable[[Any, Any], Any]
Backend = str | Callable[..., Any]


def whole(task: LightningModule, backend: Backend) -> Any:
    return torch.compile(task, backend=backend)


def submodule(task: Task, backend: Backend) -> Task:
    task.net.middle = torch.compile(task.net.middle, backend=backend)
    return task


def net(task: Task, backend: Backend) -> Task:
    task.net = torch.compile(task.net, backend=backend)
    return task


def in_place(task: Task, backend: Backend) -> Task:
    task.net.compile(backend=backend)
    return task


WAYS = {"module": whole, "net": net, "submodule": submodule, "in place": in_place}
BACKENDS = [
    "aot_eager",  # "eager" has a row in the matrix
    pytest.param(
        "inductor",
        marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")],
    ),
]


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys())
def compiled(request: pytest.FixtureRequest) -> Compiler:
    torch._dynamo.reset()
    return request.param


def fit(wrap: Compiler | None, backend: Backend, *callbacks: Callback, **task_options: Any) -> Task:
    """Two epochs, of which the second is captured."""
    torch.manual_seed(0)
    task = Task(seeded(Net), **task_options)
    train(task if wrap is None else wrap(task, backend), vector_data(), *callbacks, max_epochs=2)
    return task


def capture(path: Path) -> InfluenceCallback:
    return InfluenceCallback(path, codec="pairs-float32", on_error="raise")


@pytest.mark.parametrize("backend", BACKENDS)
def test_captured_rows_are_those_of_the_eager_run_to_the_last_bit(
    compiled: Compiler, backend: str, tmp_path: Path
) -> None:
    """At weights that stand still; compiled kernels may round the steps before otherwise."""
    fit(None, "", capture(tmp_path / "eager.h5"))
    fit(compiled, backend, capture(tmp_path / "compiled.h5"))
    eager, other = StoreReader(tmp_path / "eager.h5"), StoreReader(tmp_path / "compiled.h5")
    layers = {name.replace("_orig_mod.", "").removesuffix("._orig_mod"): name for name in other.layers}
    assert list(layers) == list(eager.layers)
    for name in eager.layers:
        expected, found = eager.rows(name), other.rows(layers[name])
        assert all(np.array_equal(found[key], expected[key]) for key in expected)
        expected, found = eager.factors(name), other.factors(layers[name])
        assert all(np.array_equal(found[key], expected[key]) for key in expected)
    assert other.column("loss").tolist() == eager.column("loss").tolist()


class WeightsOfSteps(Callback):
    """A digest of the weights after every step."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_batch_end(self, trainer: Trainer, model: LightningModule, *rest: Any) -> None:
        self.seen.append(digest([parameter.detach() for parameter in model.parameters()]))


def test_training_is_bit_identical_at_every_step(compiled: Compiler, tmp_path: Path) -> None:
    plain, captured = WeightsOfSteps(), WeightsOfSteps()
    fit(compiled, "eager", plain, optimizer=MOVING)
    torch._dynamo.reset()
    fit(compiled, "eager", capture(tmp_path / "influence.h5"), captured, optimizer=MOVING)
    assert len(set(plain.seen)) == 12
    assert captured.seen == plain.seen


class CountingRuns(Callback):
    """A backend that counts, batch by batch, how often compiled code runs."""

    def __init__(self) -> None:
        self.runs, self.of_batches = 0, list[int]()

    def backend(self, graph: nn.Module, inputs: list[Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            self.runs += 1
            return graph(*arguments)

        return run

    def on_train_batch_end(self, *rest: Any) -> None:
        self.of_batches.append(self.runs)
        self.runs = 0


def test_only_batches_that_are_looked_at_run_eagerly(compiled: Compiler, tmp_path: Path) -> None:
    counting = CountingRuns()
    fit(compiled, counting.backend, capture(tmp_path / "influence.h5"), counting)
    first, second = counting.of_batches[:6], counting.of_batches[6:]
    assert first[0] == 0  # the run's first batch is looked at, whatever is captured
    assert all(runs > 0 for runs in first[1:])
    assert second == [0] * 6


def test_a_compiled_model_can_be_asked(compiled: Compiler, tmp_path: Path) -> None:
    path = tmp_path / "influence.h5"
    task = fit(compiled, "eager", capture(path))
    scores = InfluenceModule.attach(task, path).scores(list(vector_data(5, seed=7).tensors))
    assert scores.shape == (5, 22)
    assert scores.isfinite().all()
    assert torch._dynamo.eval_frame._stance.stance == "default"
