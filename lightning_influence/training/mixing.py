"""Training that makes a row of several examples, as mixup and cutmix do: its gradient belongs to no one index.

Mixing inside of `training_step` is found by asking. A copy of the model runs the first batch's step twice with
the same random numbers, the second time with the later half of the examples replaced by the earlier ones. What
the layers and the loss see of the earlier half must not change. If it does, single examples are replaced: one
that changes one other row, or few, was mixed into it; one that changes all of them is part of something like a
mean over the batch, which couples examples as batch normalization does and mixes nothing. Nor do outputs that
only the loss puts together, such as negatives in the batch.

Mixing before the step (in a `collate_fn`, a transfer hook, another callback) is not seen by asking. Mixed
targets, of two classes each, give it away.

Torch's own modules are in eval mode in the copy: of batch normalization is known what it does, and without
dropout fewer numbers are drawn.
"""

from __future__ import annotations

import logging
import pickle
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_influence.errors import UnsupportedTrainingError
from lightning_influence.layers import TrackedLayer
from lightning_influence.losses import LossTap
from lightning_influence.training.asking import (
    asked_of,
    copy_to_ask,
    kept_random_states,
    training_objective,
    without_other_processes,
)
from lightning_influence.training.mixed_targets import (
    HALF_TOLERANCE,
    NO_INDEX,
    REMEDY,
    Mixing,
    find_mixed_targets,
    tolerance_of,
)

logger = logging.getLogger(__name__)

DRAWS = 4  # an augmentation that is applied to half of the batches is missed in one of 16 runs


def check_mixing(
    trainer: Trainer,
    model: LightningModule,
    layers: Mapping[str, TrackedLayer],
    batch: Any,
    n: int,
    *,
    is_captured: bool = True,
) -> None:
    """Refuse training that makes rows of several examples, and warn where it may, or where a batch is coupled.

    Args:
        trainer: whose precision and epoch are used.
        model: in training; a copy of it is asked.
        layers: the tracked layers, with their batch dimensions.
        batch: as `training_step` got it, n examples in the first dimension of its tensors.
        n: number of examples.
        is_captured: whether the batch's rows are wanted; of another one, all there is to say is a warning.

    Raises:
        UnsupportedTrainingError: if rows are certain to be made of several examples.
    """
    for found in (find_mixed_targets(batch, n), find_mixing(trainer, model, layers, batch, n)):
        if found is not None and found.is_certain and is_captured:
            raise UnsupportedTrainingError(found.text)
        if found is not None:
            rank_zero_warn(f"InfluenceCallback: {found.text}")


def find_mixing(
    trainer: Trainer, model: LightningModule, layers: Mapping[str, TrackedLayer], batch: Any, n: int
) -> Mixing | None:
    """Mixing in `training_step`, or None if there is none or the model cannot be asked; see `check_mixing`.

    Cost: two forwards of the batch, eight if the step draws random numbers; some more if there is something.
    """
    if n < 2 or not model.automatic_optimization:
        return None
    try:
        with kept_random_states(), trainer.precision_plugin.forward_context():
            return _Inquiry(trainer, model, layers, batch, n).verdict()
    except Exception as error:  # the user's code runs here, in a way it may not be made for
        logger.debug("the model could not be asked whether it mixes examples", exc_info=error)
        return None


class _Seen(NamedTuple):
    """What a layer or a loss saw of each example.

    Args:
        where: its name, for messages.
        is_layer: whether it is a layer. Outputs that a loss puts together leave each layer's rows their own.
        shape: of the input.
        prints: a number for each example that tells its input from others, shape [n].
        noise: how far it may be off without a meaning, shape [n].
    """

    where: str
    is_layer: bool
    shape: torch.Size
    prints: Tensor
    noise: Tensor

    @classmethod
    def of(cls, where: str, value: Tensor, batch_dim: int, *, is_layer: bool) -> _Seen:
        """The input as it is now; it may be changed in place later."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            rows = value.detach().movedim(batch_dim, 0).reshape(value.shape[batch_dim], -1).float()  # [n, i]
            waves = torch.arange(1, rows.shape[1] + 1, device=rows.device).float().sin()
            prints, norms = (rows * waves).sum(1).cpu(), rows.norm(dim=1).cpu()
        is_half = torch.is_autocast_enabled(value.device.type)
        noise = norms * (HALF_TOLERANCE if is_half else tolerance_of(value.dtype))
        return cls(where, is_layer, value.shape, prints, noise)

    def changed(self, other: _Seen, *, exactly: bool) -> set[int]:
        """The examples of which the other saw something else; where a number is not finite, none."""
        difference = (self.prints - other.prints).abs()
        bound = torch.zeros_like(self.noise) if exactly else torch.maximum(self.noise, other.noise)
        return set((difference > bound).nonzero().flatten().tolist())


class _Answer(NamedTuple):
    """What was seen in one step, and the random states before and after it."""

    seen: list[_Seen]
    states: tuple[Any, Any]


class _UnclearError(Exception):
    """Two steps cannot be compared: what they draw, or their shapes, depend on the data."""


class _Inquiry:
    """Asks a copy of the model about the first batch with some of its examples replaced."""

    def __init__(
        self, trainer: Trainer, model: LightningModule, layers: Mapping[str, TrackedLayer], batch: Any, n: int
    ) -> None:
        self._model, self._layers = copy_to_ask(model, layers)
        self._model.trainer = _Clock(trainer)  # type: ignore[assignment]
        self._training = [module for module in self._model.modules() if module.training and not _is_known(module)]
        self._batch, self._n = batch, n

    def verdict(self) -> Mixing | None:
        """What was found, if anything."""
        later = range(self._n // 2, self._n)
        for draw in range(DRAWS):
            plain = self._ask(draw)
            for place, rows in enumerate(self._changes(plain, draw, later)):
                if not rows:
                    continue
                if any(self._changes(plain, draw, ())):
                    return None  # it draws numbers of its own
                exactly = not any(self._changes(plain, draw, (), exactly=True))  # not so with some GPU kernels
                return self._judge(plain, draw, place, min(rows), exactly=exactly)
            if plain.states[0] == plain.states[1]:
                return None  # nothing was drawn
        return None

    def _judge(self, plain: _Answer, draw: int, place: int, row: int, *, exactly: bool) -> Mixing:
        """Find one example that changes what is seen of this row, and see what else it changes."""
        examples: Sequence[int] = range(self._n // 2, self._n)
        while len(examples) > 1:
            middle = len(examples) // 2
            first = self._changes(plain, draw, examples[:middle], exactly=exactly)[place]
            examples = examples[:middle] if row in first else examples[middle:]
        changed = self._changes(plain, draw, examples, exactly=exactly)[place]
        where, is_layer = plain.seen[place].where, plain.seen[place].is_layer
        if is_layer and row in changed and len(changed) <= (self._n - 1) / 3:
            return Mixing(
                True,
                f"`training_step` of {type(self._model).__name__} makes rows of several examples, as mixup and "
                f"cutmix do: what {where} sees of example {row} of the first batch depends on example "
                f"{examples[0]}. {NO_INDEX} {REMEDY} Or, if it is only done in training mode, pass "
                '`rows="final"`.',
            )
        return Mixing(
            False,
            f"what {where} sees of an example depends on the other examples of its batch in training (by a mean "
            "over the batch, say, or as they are compared in the loss), so a row holds what the batch's loss owes "
            "to its example, and scores of queries, in other batches, are approximate.",
        )

    def _changes(
        self, plain: _Answer, draw: int, replaced: Sequence[int], *, exactly: bool = False
    ) -> list[set[int]]:
        """For all that was seen, the examples that look different though they are not those replaced."""
        answer = self._ask(draw, replaced)
        if answer.states != plain.states or len(answer.seen) != len(plain.seen):
            raise _UnclearError
        pairs = list(zip(plain.seen, answer.seen, strict=True))
        if any((one.where, one.shape) != (other.where, other.shape) for one, other in pairs):
            raise _UnclearError
        return [one.changed(other, exactly=exactly) - set(replaced) for one, other in pairs]

    def _ask(self, draw: int, replaced: Sequence[int] = ()) -> _Answer:
        """One step in training mode, with the random numbers of a draw."""
        seen: list[_Seen] = []
        with ExitStack() as asked:
            asked.enter_context(torch.inference_mode(False))
            asked.enter_context(torch.enable_grad())
            asked.enter_context(asked_of(self._model, self._layers))
            asked.enter_context(torch.compiler.set_stance("force_eager"))  # so that all hooks are called
            for module in self._training:
                module.training = True
            for name, layer in self._layers.items():
                for source in layer.sources:
                    hook = self._hook(seen, name, _batch_dim(source.module, layer))
                    asked.callback(source.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            asked.enter_context(without_other_processes())
            tap = asked.enter_context(LossTap())
            batch = self._with_replaced(replaced)
            before = _seeded_states(draw)
            training_objective(self._model, batch)
            after = _random_states()
        return _Answer(seen + self._seen_by_losses(tap), (before, after))

    def _hook(self, seen: list[_Seen], name: str, batch_dim: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            is_attention = isinstance(module, nn.MultiheadAttention)  # of query, key and value
            for value in (*args, *kwargs.values())[: 3 if is_attention else 1]:
                if isinstance(value, Tensor) and value.ndim > batch_dim and value.shape[batch_dim] == self._n:
                    seen.append(_Seen.of(f"layer {name!r}", value, batch_dim, is_layer=True))

        return hook

    def _seen_by_losses(self, tap: LossTap) -> list[_Seen]:
        """Inputs and targets; where positions may come first, as many as there are examples, it cannot be told."""
        return [
            _Seen.of(f"`{call.name}`", value, 0, is_layer=False)
            for call in tap.calls
            for value in (*call.args[:2], call.kwargs.get("input"), call.kwargs.get("target"))
            if isinstance(value, Tensor) and value.shape[:1] == (self._n,) and self._n not in value.shape[1:-1]
        ]

    def _with_replaced(self, replaced: Sequence[int]) -> Any:
        """A copy of the batch, some later examples of it replaced by earlier ones."""
        index = torch.arange(self._n)
        index[list(replaced)] %= self._n // 2

        def replace(tensor: Tensor) -> Tensor:
            if tensor.shape[:1] != (self._n,):
                return tensor.detach().clone()
            return tensor.detach().index_select(0, index.to(tensor.device))

        return apply_to_collection(self._batch, Tensor, replace)


class _Clock:
    """The numbers of a trainer, such as `current_epoch`, for a step that asks for them, and nothing else of it."""

    logger = None
    loggers: tuple[()] = ()

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __getattr__(self, name: str) -> int | float | None:
        value = getattr(self._trainer, name)
        if value is not None and not isinstance(value, int | float):
            raise AttributeError(f"a copy of the model has no trainer whose `{name}` it could use.")
        return value


def _is_known(module: nn.Module) -> bool:
    """Whether what it does in training is known: torch's own modules mix nothing."""
    return isinstance(module, _BatchNorm) or type(module).__module__.startswith("torch.nn.")


def _batch_dim(module: nn.Module, layer: TrackedLayer) -> int:
    """The dimension of the module's inputs that counts examples."""
    return int(not module.batch_first) if isinstance(module, nn.MultiheadAttention) else layer.batch_dim


def _seeded_states(seed: int) -> Any:
    """The global random states after seeding; whoever calls puts back what was before."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed)
    random.seed(seed)
    return _random_states()


def _random_states() -> Any:
    """The global random states, in a form that compares."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    states = [state.tolist() for state in (torch.get_rng_state(), *cuda)]
    return states, pickle.dumps(np.random.get_state()), random.getstate()
