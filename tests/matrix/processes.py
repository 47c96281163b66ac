"""Several processes, and strategies that capture refuses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, distributed

from lightning_influence import InfluenceCallback
from tests.integration.models import Pooled, position_data, vector_data
from tests.matrix.situation import FLOAT32, INT8, SPOOLED, Expected, Run, Situation, refused, shuffled

ODD = 23  # one of the two ranks gets an example twice, to have as many as the other
odd_data = partial(vector_data, ODD)
odd_sequences = partial(position_data, ODD)


def on_two(strategy: str, **more: Any) -> dict[str, Any]:
    """Two gloo ranks."""
    return {"strategy": strategy, "devices": 2, **more}


def set_up_only(make: type[Strategy], run: Run) -> Trainer:
    """As far as a callback's `setup`: the strategy itself needs a GPU or a package to be launched."""
    trainer = run.make_trainer()
    trainer._accelerator_connector.strategy = make.__new__(make)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, InfluenceCallback):
            callback.setup(trainer, run.model, "fit")
    trainer._accelerator_connector.strategy = run.make_trainer().strategy
    return trainer


def fails_on_one_rank(rank: int, batch: Sequence[Tensor]) -> list[int]:
    """The rows' places, but not everywhere."""
    if distributed.get_rank() == rank:
        raise KeyError("the user's own")
    return [int((odd_data().tensors[0] == row).all(1).nonzero()) for row in batch[0]]


def processes(name: str, strategy: str, *, codec: str = "pairs-float32", **more: Any) -> Situation:
    """The odd dataset in two processes."""
    exact = codec == "pairs-float32"
    usual = {
        "expected": Expected(rows=f"{ODD}/0/0", tolerance=FLOAT32 if exact else INT8, factors=1e-6),
        "data": partial(shuffled, odd_data),
        "examples": odd_data,
        "trainer": partial(on_two, strategy),
        "influence": {"codec": codec},
        "process": "script" if strategy == "ddp" else "forked",
    }
    return Situation(name, **{**usual, **more})


PROCESSES = [
    processes("ddp x 2", "ddp"),
    processes("ddp_fork x 2", "ddp_fork"),
    processes("ddp_fork x 2, codec eigen", "ddp_fork", codec="eigen"),
    processes(
        'ddp_fork x 2, codec eigen, epochs="every"',
        "ddp_fork",
        expected=Expected("epochs 0 1", f"{ODD}/0/0", tolerance=INT8, factors=SPOOLED),
        influence={"codec": "eigen", "epochs": "every", "trajectory": "segments"},
    ),
    processes(
        "ddp_fork x 2, sequences, codec eigen",
        "ddp_fork",
        codec="eigen",
        net=Pooled,
        data=partial(shuffled, odd_sequences),
        examples=odd_sequences,
    ),
    processes("ddp_spawn x 2", "ddp_spawn"),
    processes(
        "ddp x 2, capture fails on one rank",
        "ddp",
        expected=refused("Process 1 of 2 failed.*KeyError: .the user's own"),
        influence={"index_fn": partial(fails_on_one_rank, 1)},
    ),
    *(
        Situation(strategy.__name__, refused(strategy.__name__), fit=partial(set_up_only, strategy))
        for strategy in (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)
    ),
]
