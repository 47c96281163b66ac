"""Several processes, and strategies that capture refuses."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from lightning_influence import InfluenceCallback
from tests.integration.models import vector_data
from tests.matrix.situation import Expected, Run, Situation, refused, shuffled

ODD = 23  # one of the two ranks gets an example twice, to have as many as the other
odd_data = partial(vector_data, ODD)


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


def processes(name: str, strategy: str, *, is_scripted: bool = False, codec: str = "pairs-float32") -> Situation:
    """The odd dataset in two processes."""
    return Situation(
        name,
        Expected(rows=f"{ODD}/0/0", tolerance=1e-5 if codec == "pairs-float32" else 1e-2, factors=1e-6),
        data=partial(shuffled, odd_data),
        examples=odd_data,
        trainer=partial(on_two, strategy),
        influence={"codec": codec},
        is_scripted=is_scripted,
    )


PROCESSES = [
    processes("ddp x 2", "ddp", is_scripted=True),
    processes("ddp_fork x 2", "ddp_fork"),
    processes("ddp_fork x 2, codec eigen", "ddp_fork", codec="eigen"),
    processes("ddp_spawn x 2", "ddp_spawn"),
    *(
        Situation(strategy.__name__, refused(strategy.__name__), fit=partial(set_up_only, strategy))
        for strategy in (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)
    ),
]
