"""What a captured file is worth: which epochs and rows it holds, stored/true, and its factors.

True gradients are autograd's, one example at a time in float64, at the weights of the still run. Factors are
those of the rows that a single process in float32 captures of the same net and data: A and S of the rows that
count, as often as they were trained on, and Lambda of the same in the file's own basis, for eigenvectors have
no unique sign. Where rows stand in the basis of the epoch before, A and S are of all that it has seen.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_influence.errors import StoreError
from lightning_influence.query import InfluenceQuery
from lightning_influence.store import StoreReader
from tests.integration.models import Checkpointed, Loss, seeded
from tests.matrix.running import train
from tests.matrix.situation import Situation, shuffled
from tests.reference.factors import covariances, eigenvalue_correction
from tests.reference.gradients import linear_layer_names, per_example_gradients


@dataclass(frozen=True)
class Contents:
    """What is in the file of one captured epoch.

    Args:
        rows: written/missing/invalid.
        ratio: the median of <stored, true> / <true, true>; NaN where that has no meaning.
        factors: the largest error of A, S and Lambda, each relative to its largest entry.
    """

    rows: str
    ratio: float
    factors: float


def file_status(path: Path) -> tuple[str, list[StoreReader]]:
    """Which epochs the file holds, every byte checked, and what lies about; and its epochs, the latest last."""
    leftovers = sorted({each.suffix for each in path.parent.iterdir() if each.name.startswith(f"{path.name}.")})
    also = f" + {' '.join(leftovers)}" if leftovers else ""
    if not path.exists():
        return f"none{also}", []
    try:
        held = segments(StoreReader(path))
        for each in held:
            each.verify_rows()
    except StoreError as error:
        return f"{type(error).__name__}{also}", []
    epochs = [str(each.attributes["epoch"]) for each in held]
    return f"{'epoch' if len(epochs) == 1 else 'epochs'} {' '.join(epochs)}{also}", held


def segments(reader: StoreReader) -> list[StoreReader]:
    """The captured epochs of a file, in their order."""
    return [reader.segment(number) for number in reader.segments]


def contents(reader: StoreReader, situation: Situation, weights: Mapping[str, Tensor]) -> Contents:
    """Measure one captured epoch against the truth.

    Args:
        reader: the epoch in the file of the still run.
        situation: what was run.
        weights: the module's state in that run.
    """
    written, valid = (torch.from_numpy(reader.column(name)).bool() for name in ("written", "valid"))
    rows = f"{int(written.sum())}/{int((~written).sum())}/{int((written & ~valid).sum())}"
    if not situation.is_exact:
        return Contents(rows, float("nan"), float("nan"))
    net = still_net(situation.net, weights)
    true = true_gradients(net, situation.examples(), situation.own)
    query = InfluenceQuery(reader)
    ratios = []
    for name, layer in query.layers.items():
        arrays = {key: torch.tensor(array)[valid] for key, array in reader.rows(name).items()}
        found = layer.codec.decode(arrays).double().flatten(1)
        expected = true[_plain(name)][valid].flatten(1)
        size = expected.square().sum(1)
        ratios.append(((found * expected).sum(1) / size)[size > 0])
    times = _times(reader)[valid]
    return Contents(rows, float(torch.cat(ratios).median()), _factor_error(reader, situation, valid, times))


def _times(reader: StoreReader) -> Tensor:
    """How often each example was trained on."""
    return torch.from_numpy(reader.column("occurrences")).long()


def _factor_error(reader: StoreReader, situation: Situation, valid: Tensor, times: Tensor) -> float:
    single, errors = single_process_rows(situation.net, situation.loss, situation.examples, situation.own), []
    for name in reader.layers:
        everything = single[_plain(name)]
        inputs, output_grads, gradients = (rows[valid].repeat_interleave(times, 0) for rows in everything)
        if situation.has_older_basis:
            inputs, output_grads, _ = everything
        stored = {key: torch.from_numpy(array).double() for key, array in reader.factors(name).items()}
        A, S = covariances(inputs, output_grads)
        for side, factor in (("A", A), ("S", S)):
            Q = stored[f"Q_{side}"]
            errors.append(error_of(Q @ stored[f"eigenvalues_{side}"].diag() @ Q.T, factor))
        expected = eigenvalue_correction(gradients, stored["Q_A"], stored["Q_S"])
        errors.append(error_of(stored["Lambda"], expected))
    return max(errors)


def error_of(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())


@functools.cache
def single_process_rows(
    net: Callable[[], nn.Module], loss: Loss, examples: Callable[[], Dataset], own: Loss
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By layer, inputs [n, s, i], output gradients [n, s, o] and G [n, o, i] that a plain run captures."""
    data = functools.partial(shuffled, examples)
    plain = Situation("plain", net=net, loss=loss, own=own, data=data, examples=examples)
    with tempfile.TemporaryDirectory() as folder:
        train(plain, Path(folder), is_captured=True, is_still=True)
        query = InfluenceQuery(StoreReader(Path(folder) / "influence.h5"))
    rows = {}
    for name, layer in query.layers.items():
        arrays = {key: torch.tensor(array) for key, array in query.store.rows(name).items()}
        inputs, output_grads = arrays["inputs"].double(), arrays["output_grads"].double()
        if layer.codec.get_config()["has_bias"]:
            inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
        rows[name] = inputs, output_grads, layer.codec.decode(arrays).double()
    return rows


def still_net(make: Callable[[], nn.Module], weights: Mapping[str, Tensor]) -> nn.Module:
    """The net at the weights of a run, in float64."""
    net = seeded(make).double()
    known = net.state_dict()
    state = {_plain(name).removeprefix("net."): value.double() for name, value in weights.items()}
    net.load_state_dict({name: value for name, value in state.items() if name in known})
    return net


def true_gradients(net: nn.Module, data: Dataset, own: Loss) -> dict[str, Tensor]:
    """Each example's gradient, by the layer's name in the file, [N, o, i]."""
    if isinstance(net, Checkpointed):  # reentrant checkpointing refuses `autograd.grad`
        net = copy.deepcopy(net)
        net.use_reentrant = False

    def loss(model: nn.Module, example: Any) -> Tensor:
        return own(model(example[0][None]), example[1][None])

    examples = [data[index] for index in range(len(data))]  # type: ignore[arg-type]
    gradients = per_example_gradients(net, examples, loss, linear_layer_names(net))
    return {f"net.{name}": gradient for name, gradient in gradients.items()}


def _plain(name: str) -> str:
    """A name without what compilation adds to it."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")
