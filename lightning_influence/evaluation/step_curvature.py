"""The Gauss-Newton matrix of what a model's own `training_step` minimizes.

    G = (1/N) sum_n J_nᵀ (∇²_f l_n) J_n,    J_n = d f_n / d parameters

with f what the recognized loss functions are called with, and l_n each example's own loss, as rows have it (see
`losses.functions`). It is the matrix of `solvers.GaussNewtonOperator`, for models whose batches are no pairs
(inputs, targets) and whose loss is not at hand. Products with J come from two backwards (Townsend 2017, "A new
trick for calculating Jacobian vector products"): g(u) = Jᵀ u is linear in u, and its derivative along v is J v.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.errors import LossNotRecognizedError
from lightning_influence.layers import TrackedLayer
from lightning_influence.losses.call import LossCall
from lightning_influence.losses.reading import LossReading
from lightning_influence.losses.scale import weighed_readings
from lightning_influence.solvers import CurvatureOperator
from lightning_influence.solvers.objective import twice_differentiable
from lightning_influence.step import StepCapture
from lightning_influence.training.asking import back_propagated, training_objective


class LayerVectors:
    """Layers' matrices [o, i] and one flat vector of the p parameters that they are made of.

    Args:
        layers: by name.
        parameters: the layers', in the order of the vector; None takes the layers'.
    """

    def __init__(
        self, layers: Mapping[str, TrackedLayer], parameters: Iterable[nn.Parameter] | None = None
    ) -> None:
        self.layers = layers
        own = (p for layer in layers.values() for p in layer.parameters.values())
        self.parameters = [*{id(p): p for p in (own if parameters is None else parameters)}.values()]
        self.size = sum(p.numel() for p in self.parameters)
        first = self.parameters[0]
        self.dtype, self.device = first.dtype, first.device
        ends = torch.tensor([0, *(p.numel() for p in self.parameters)]).cumsum(0).tolist()
        places = {
            id(p): torch.arange(*ends[k : k + 2]).view(p.shape).to(p.device) for k, p in enumerate(self.parameters)
        }
        self.positions = {
            name: layer.matrix({key: places[id(p)] for key, p in layer.parameters.items()})
            for name, layer in layers.items()
        }
        self.covered = torch.zeros(self.size, dtype=torch.bool, device=self.device)
        for where in self.positions.values():
            self.covered[where.flatten()] = True

    def flat(self, matrices: Mapping[str, Tensor]) -> Tensor:
        """Matrices [q, o, i] by layer as vectors [q, p]; zero where a parameter is of no layer."""
        q = len(next(iter(matrices.values())))
        result = torch.zeros(q, self.size, dtype=self.dtype, device=self.device)
        for name, where in self.positions.items():
            result[:, where] = matrices[name].to(result)
        return result

    def matrices(self, vectors: Tensor) -> dict[str, Tensor]:
        """The inverse of `flat`."""
        return {name: vectors[:, where] for name, where in self.positions.items()}

    def split(self, vector: Tensor) -> list[Tensor]:
        """A vector [p] in the parameters' shapes."""
        parts = vector.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]


@dataclass(frozen=True, eq=False)
class CurvedLoss:
    """One loss call of a step as a function of what gradients flow through.

    Args:
        predictions: tensors of the graph.
        value: the sum over examples of their losses, of tensors in the predictions' place.
    """

    predictions: list[Tensor]
    value: Callable[[list[Tensor]], Tensor]


class StepGaussNewton(CurvatureOperator):
    """G of some batches, plus a damping for each layer; the model is asked in eval mode and left as it was.

    Args:
        model: a `LightningModule` whose `training_step` returns a recognized loss.
        vectors: of the layers; other parameters are held fixed.
        batches: pairs of the number of examples and the batch, on the model's device.
        damping: of each layer, added to G's diagonal.
    """

    def __init__(
        self,
        model: nn.Module,
        vectors: LayerVectors,
        batches: Sequence[tuple[int, Any]],
        damping: Mapping[str, float],
    ) -> None:
        super().__init__()
        self.model, self.vectors, self.batches = model, vectors, batches
        self.num_examples = sum(n for n, _ in batches)
        self._damping = torch.zeros(vectors.size, dtype=vectors.dtype, device=vectors.device)
        for name, where in vectors.positions.items():
            self._damping[where] = damping[name]

    @property
    def size(self) -> int:
        """The number p of parameters."""
        return self.vectors.size

    @property
    def dtype(self) -> torch.dtype:
        """The parameters'."""
        return self.vectors.dtype

    @property
    def device(self) -> torch.device:
        """The parameters'."""
        return self.vectors.device

    @property
    def num_batches(self) -> int:
        """How many batches were given."""
        return len(self.batches)

    def curvature_product(self, vectors: Tensor, batch: int | None = None) -> Tensor:
        """(G + damping) v for each row [q, p]; of one batch, its estimate."""
        chosen = self.batches if batch is None else [self.batches[batch]]
        share = 1 if batch is None else self.num_batches
        inside = vectors * self.vectors.covered
        total = sum((self._sum_product(n, each, inside) for n, each in chosen), torch.zeros_like(vectors))
        return total * self.vectors.covered * (share / self.num_examples) + self._damping * vectors

    def _sum_product(self, n: int, batch: Any, vectors: Tensor) -> Tensor:
        capture = StepCapture(self.vectors.layers)
        capture.keep_graph(True)
        found = torch.zeros_like(vectors)

        def add(total: Tensor) -> None:
            capture.set_open(False)
            with torch._C.DisableTorchFunction(), torch.enable_grad():  # none of this is the step's
                for curved in curved_losses(total, capture.tap.calls, n):
                    found.add_(_product(curved, self.vectors, vectors))

        with (
            twice_differentiable(),
            back_propagated(self.model, capture, batch, training_objective, before_backward=add),
        ):
            capture.clear()
        return found


def curved_losses(total: Tensor, calls: Sequence[LossCall], n: int) -> list[CurvedLoss]:
    """What a step minimizes, as sums over its examples, just before its backward.

    Args:
        total: that will be back-propagated.
        calls: the step's, with their graph.
        n: number of examples.

    Raises:
        LossNotRecognizedError: if no recognized loss takes part, or one of them is maximized.
    """
    with_graph = [call for call in calls if call.graph is not None]
    edges = [call.graph.edge for call in with_graph if call.graph is not None]
    ones = torch.ones_like(total)
    constants = torch.autograd.grad(total, edges, ones, retain_graph=True, allow_unused=True) if edges else ()
    try:
        for call, constant in zip(with_graph, constants, strict=True):
            call.constant = constant
        weighed = weighed_readings(with_graph, n)
    finally:
        for call in with_graph:
            call.constant = None
    first = weighed[0][1].unreduced_constant.flatten()
    if any(weight <= 0 for _, _, weight in weighed) or bool((first < 0).any()):
        raise LossNotRecognizedError(
            "A loss of the step is maximized, so that its Gauss-Newton matrix is not positive; "
            "agreement with it cannot be measured."
        )
    return [_curved(call, reading, weight) for call, reading, weight in weighed]


def _curved(call: LossCall, reading: LossReading, weight: float) -> CurvedLoss:
    assert call.graph is not None
    given = inspect.signature(call.function).bind(*call.graph.args, **call.graph.kwargs).arguments
    fixed = {name: value.detach() if isinstance(value, Tensor) else value for name, value in given.items()}
    inside = call.arguments_in_graph()
    counted = torch.tensor(reading.count)
    if reading.reduction == "none":  # an example's own loss has no weight, but masked elements are not in it
        counted = (reading.unreduced_constant != 0).float()

    def value(tensors: list[Tensor]) -> Tensor:
        losses = call.function(**{**fixed, **dict(zip(inside, tensors, strict=True))})
        return weight * (losses * counted.to(losses)).sum()

    return CurvedLoss([*inside.values()], value)


def _product(curved: CurvedLoss, space: LayerVectors, vectors: Tensor) -> Tensor:
    """Jᵀ (∇²_f value) J v for each row [q, p], with the model's graph kept."""
    predictions, parameters = curved.predictions, space.parameters
    cotangents = [torch.zeros_like(f, requires_grad=True) for f in predictions]
    pulled = torch.autograd.grad(predictions, parameters, cotangents, create_graph=True, allow_unused=True)
    seen = [k for k, gradient in enumerate(pulled) if gradient is not None and gradient.requires_grad]
    at = [f.detach().requires_grad_() for f in predictions]
    slopes = torch.autograd.grad(curved.value(at), at, create_graph=True)
    result = torch.zeros_like(vectors)
    for row, vector in zip(result, vectors, strict=True):
        moved = [space.split(vector)[k] for k in seen]
        tangents = torch.autograd.grad(  # J v
            [pulled[k] for k in seen], cotangents, moved, retain_graph=True, materialize_grads=True
        )
        curvature = torch.autograd.grad(slopes, at, tangents, retain_graph=True, materialize_grads=True)
        back = torch.autograd.grad(predictions, parameters, curvature, retain_graph=True, materialize_grads=True)
        row.copy_(torch.cat([gradient.flatten() for gradient in back]))
    return result
