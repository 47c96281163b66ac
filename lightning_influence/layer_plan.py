"""How each layer's gradients will be stored, chosen from the first batch, and the bytes that it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from lightning_influence.codecs import DenseCodec, PairsCodec
from lightning_influence.codecs.tiers import BYTES_PER_COORDINATE
from lightning_influence.errors import LayerError
from lightning_influence.functional.quantize import RowDtype
from lightning_influence.functional.structure import FULL, KroneckerStructure
from lightning_influence.gradients import EncodedGradient, FactoredGradient, LayerGradient
from lightning_influence.layers import TrackedLayer
from lightning_influence.store import COLUMNS

LEAST_BYTES = 5  # of eigen-coordinates: one of 8 bits, and its scale
INT8_ERROR = 0.02  # 1 - Spearman of scores of int8 pairs, with room
COLUMN_BYTES = sum(np.dtype(dtype).itemsize for dtype, _ in COLUMNS.values())
CodecName = Literal["auto", "pairs", "pairs-float16", "pairs-float32", "eigen"]


@dataclass(frozen=True)
class LayerPlan:
    """How a layer's rows will be stored.

    Args:
        shape: (o, i) of the layer's gradient.
        has_bias: whether the gradient's last column is the bias's.
        codec: "pairs", "dense" or "eigen".
        positions: shared positions of an example, as the first batch had them.
        dtype: of stored pairs or dense gradients.
        structure: which Kronecker factors there are.
        ends_in_ones: whether every input ends in the bias's 1, which pairs then leave out.
        batch_dim: the dimension of the layer's inputs that counts examples.
    """

    shape: tuple[int, int]
    has_bias: bool
    codec: Literal["pairs", "dense", "eigen"]
    positions: int
    dtype: RowDtype = "int8"
    structure: KroneckerStructure = FULL
    ends_in_ones: bool = False
    batch_dim: int = 0

    @property
    def needs_basis(self) -> bool:
        """Whether rows can be written only after covariances were seen."""
        return self.codec == "eigen" and not self.structure.is_diagonal

    def to_builtins(self) -> dict[str, Any]:
        """Plain values, from which `of_builtins` makes the plan again."""
        return {**vars(self), "structure": self.structure.to_builtins()}

    @classmethod
    def of_builtins(cls, values: Mapping[str, Any]) -> LayerPlan:
        """The inverse of `to_builtins`."""
        structure = KroneckerStructure(**values["structure"])
        return cls(**{**values, "shape": tuple(values["shape"]), "structure": structure})

    def codec_without_basis(self) -> PairsCodec | DenseCodec:
        """The codec for rows that are written before there is a basis."""
        if self.codec == "dense":
            return DenseCodec(self.shape, dtype=self.dtype)
        return PairsCodec(self.shape, positions=self.positions, has_bias=self.ends_in_ones, dtype=self.dtype)


def plan_layers(
    layers: Mapping[str, TrackedLayer],
    gradients: Mapping[str, LayerGradient],
    codec: CodecName,
    error_budget: float | None = None,
) -> dict[str, LayerPlan]:
    """Choose a codec for each layer from one batch's gradients.

    "auto" takes pairs where an example's gradient is one outer product, and eigen-coordinates elsewhere. Its pairs
    are int8, unless they might lose more than the error budget, then float16.
    "pairs" takes dense gradients where the layer's are no outer products.

    Raises:
        ValueError: if there is no codec of that name.
    """
    if codec not in get_args(CodecName):
        raise ValueError(f"`codec` must be one of {', '.join(get_args(CodecName))}, got {codec!r}.")
    family, _, dtype = codec.partition("-")
    if codec == "auto" and error_budget is not None and error_budget < INT8_ERROR:
        dtype = "float16"
    plans = {}
    for name, layer in layers.items():
        gradient = gradients[name]
        chosen = family
        if family == "auto":
            chosen = "pairs" if isinstance(gradient, FactoredGradient) and gradient.positions == 1 else "eigen"
        elif family == "pairs" and not isinstance(gradient, FactoredGradient):
            chosen = "dense"
        plans[name] = LayerPlan(
            layer.shape,
            layer.has_bias,
            chosen,  # type: ignore[arg-type]
            gradient.positions,
            dtype or "int8",  # type: ignore[arg-type]
            layer.structure,
            layer.ends_in_ones,
            layer.batch_dim,
        )
    return plans


def plan_whole_gradients(
    layers: Mapping[str, TrackedLayer], gradients: Mapping[str, LayerGradient], codec: CodecName = "auto"
) -> dict[str, LayerPlan]:
    """How each layer's whole gradients are kept, nearly exact and without an eigenbasis, until they are merged.

    That is as float16 pairs where an example's gradient is one outer product, and as the float16 gradient itself
    elsewhere, of which batches may differ in their positions; everywhere with `codec="eigen"`.
    """
    plans = {}
    for name, plan in plan_layers(layers, gradients, "pairs-float16").items():
        o, i = plan.shape
        is_pair = codec != "eigen" and plan.codec == "pairs" and plan.positions == 1 and o + i <= o * i
        plans[name] = replace(plan, codec="pairs" if is_pair else "dense")
    return plans


def check_gradients(plans: Mapping[str, LayerPlan], gradients: Mapping[str, LayerGradient]) -> None:
    """Refuse gradients for which the rows that were planned have no room.

    Raises:
        LayerError: naming the layer.
    """
    for name, plan in plans.items():
        if isinstance(gradients[name], EncodedGradient):  # they were, before they became rows
            continue
        found = gradients[name].positions
        if plan.codec == "pairs" and not isinstance(gradients[name], FactoredGradient):
            raise LayerError(
                f"Layer {name!r} was used in another way than in the first batch, so that its gradients are "
                "no pairs; pass `codec='eigen'`."
            )
        if plan.codec == "pairs" and found > plan.positions:
            raise LayerError(
                f"Layer {name!r} has {found} positions in an example, but rows of pairs were laid out "
                f"for the {plan.positions} of the first batch; pass `codec='eigen'`, or pad all batches "
                "alike."
            )


def expected_bytes_per_row(plans: Mapping[str, LayerPlan], bytes_per_example: int) -> int:
    """Bytes that one example's row arrays will take; exact for pairs, the most it can be for eigen."""
    pairs = sum(plan.codec_without_basis().bytes_per_row for plan in plans.values() if plan.codec != "eigen")
    sizes = [math.prod(plan.shape) for plan in plans.values() if plan.codec == "eigen"]
    least = LEAST_BYTES * len(sizes)
    return pairs + max(least, min(bytes_per_example, round(sum(sizes) * BYTES_PER_COORDINATE[8])))


def expected_file_bytes(plans: Mapping[str, LayerPlan], bytes_per_row: int, num_examples: int) -> int:
    """About the size of the whole file: rows, columns and float32 factors."""
    factors = 0
    for plan in plans.values():
        sides = (plan.structure.inputs_shape(plan.shape), plan.structure.outputs_shape(plan.shape), plan.shape)
        factors += 4 * sum(math.prod(side) for side in sides)
    return num_examples * (bytes_per_row + COLUMN_BYTES) + factors
