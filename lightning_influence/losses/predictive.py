"""Gradients under labels that the model itself predicts, at the prediction: what makes a Fisher of the true kind.

A loss function is read as the negative log-likelihood of a distribution p(y | f) of labels given the prediction
f. The loss l_n of an example is a sum over its elements e (positions for classes, numbers for all others), each
with a weight w_e that the call gives it: class weights, `pos_weight`, masks, 1 / elements for
`reduction="mean"`, the weight of one call relative to the first. Then

    F_n = sum_e w_e J_e^T E_{y ~ p}[s s^T] J_e,     s = -d log p(y | f_e) / d f_e,

which for these functions is the generalized Gauss-Newton matrix of l_n (Martens 2020, arXiv:1412.1193).
Weights enter F_n once, as repetitions of the element would. A *pull* is a gradient v at the prediction of all
examples; over the pulls of a step, the mean of (J^T v)(J^T v)^T is F_n, exactly or in expectation:

- sampled: v_e = sqrt(w_e) s with y drawn, independently for each element; k pulls for k labels.
- exact: one pull for each element, and each class of it, with v_e = sqrt(J p(y)) sqrt(w_e) s and zeros at all
  others, J their number. Products of two different elements are zero in F_n, but not in a pull that has both.

| function | p(y given f) | s |
| `cross_entropy` | categorical, softmax(f) | softmax(f) - onehot(y) |
| `nll_loss` | categorical, exp(f) | -onehot(y) |
| `binary_cross_entropy_with_logits` | Bernoulli, q = sigmoid(f) | q - y |
| `binary_cross_entropy` | Bernoulli, q = f | (q - y) / (q (1 - q)) |
| `mse_loss` | normal, variance 1/2 | 2 (f - y) |
| `gaussian_nll_loss` | normal, the given variance | (f - y) / var |
| `poisson_nll_loss` | Poisson, rate exp(f), or f | rate - y, or 1 - y / rate |

(The square without a factor of a half is the negative log-likelihood of variance 1/2: unit variance would give
half of its Gauss-Newton matrix.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812 (the name that torch's documentation uses)
from torch import Tensor

from lightning_influence.errors import LossNotRecognizedError
from lightning_influence.losses.call import LossCall
from lightning_influence.losses.functions import Arguments
from lightning_influence.losses.reading import LossReading
from lightning_influence.losses.scale import weighed_readings

NORMALIZED = 1e-2  # how far probabilities may be from adding up to one
TINY = 1e-12  # as in torch's own backward of `binary_cross_entropy`
Sampled = Callable[[torch.Generator], Tensor]


@dataclass(frozen=True, eq=False)
class Predictive:
    """What a call's labels are drawn from.

    Args:
        prediction: the tensor of the graph that pulls go into.
        pulls: the number of exact ones.
        sampled: makes a pull, of the prediction's shape.
        exact: makes exact pull number j, without the factor sqrt(J).
        is_flattened: whether the first dimension counts positions too, so that which are an example's is not sure.
    """

    prediction: Tensor
    pulls: int
    sampled: Sampled
    exact: Callable[[int], Tensor]
    is_flattened: bool = False


def supported_names() -> str:
    """The functions whose labels can be drawn, for messages."""
    return ", ".join(function.__name__ for function in (*_CLASSES, *_ELEMENTS))


def predictives(loss: Tensor, calls: list[LossCall], n: int) -> list[Predictive]:
    """Of the calls that a step's loss is made of, just before its backward; none if it overflowed.

    Args:
        loss: that will be back-propagated.
        calls: the step's, with their graph.
        n: number of examples.

    Raises:
        LossNotRecognizedError: if a call is no likelihood, or not of one prediction.
    """
    edges = [call.graph.edge for call in calls if call.graph is not None]
    if edges:
        constants = torch.autograd.grad(loss, edges, torch.ones_like(loss), retain_graph=True, allow_unused=True)
    try:
        for call, constant in zip(calls, constants if edges else (), strict=True):
            call.constant = constant
        weighed = weighed_readings(calls, n)
    finally:
        for call in calls:
            call.constant = None
    if not all(math.isfinite(weight) for _, _, weight in weighed):
        return []
    return [_predictive(call, reading, weight, n) for call, reading, weight in weighed]


@torch.no_grad()
def _predictive(call: LossCall, reading: LossReading, weight: float, n: int) -> Predictive:
    """The distribution of a call's labels."""
    if call.function not in _CLASSES and call.function not in _ELEMENTS:
        raise LossNotRecognizedError(
            f'{call.name} has no known distribution of labels; `fisher="sampled"` and "exact" support '
            f'{supported_names()}. `fisher="empirical"` works for all.'
        )
    if weight < 0:
        raise LossNotRecognizedError(
            f"{call.name} enters with weight {weight:.3g} relative to the step's first loss, and a negative "
            'weight is no likelihood\'s; pass `fisher="empirical"`.'
        )
    arguments = call.arguments()
    prediction = _prediction(call, arguments)
    share = torch.tensor(weight, dtype=arguments["input"].dtype, device=prediction.device)
    if reading.reduction == "none":
        share = share * (reading.unreduced_constant.reshape(n, -1) != 0)
    if call.function in _CLASSES:
        made = _of_classes(call, arguments, prediction, share, n)
    else:
        if reading.reduction == "mean":
            share = share * (n / arguments["input"].numel())
        made = _of_elements(call, arguments, prediction, share, n)
    return replace(made, is_flattened=reading.is_flattened)


def _prediction(call: LossCall, arguments: Arguments) -> Tensor:
    """The one argument through which gradients flow; `mse_loss` does not care which it is."""
    found = call.arguments_in_graph()
    if call.function is F.mse_loss and set(found) == {"target"}:
        arguments["input"], arguments["target"] = arguments["target"], arguments["input"]
        return found["target"]
    if set(found) != {"input"}:
        raise LossNotRecognizedError(
            f"Gradients flow into {' and '.join(map(repr, sorted(found)))} of {call.name}; labels can be drawn "
            "only where the prediction `input` alone depends on the weights: detach the others, or pass "
            '`fisher="empirical"`.'
        )
    return found["input"]


# %%
# Classes


def _of_classes(call: LossCall, arguments: Arguments, prediction: Tensor, share: Tensor, n: int) -> Predictive:
    """`share`, [] or [n, s], multiplies the weights that the function's arguments give to positions."""
    scores, target = arguments["input"], arguments["target"]
    rows = scores.movedim(1, -1) if scores.ndim > 1 else scores  # [..., o]
    log_p = rows.reshape(n, -1, rows.shape[-1])  # [n, s, o]
    is_logits = call.function is F.cross_entropy
    p = log_p.softmax(-1) if is_logits else log_p.exp()
    if not is_logits and bool(((p.sum(-1) - 1).abs() > NORMALIZED).any()):
        raise LossNotRecognizedError(
            "The `input` of nll_loss does not hold log-probabilities (their exponentials do not add up to 1), so "
            'no label can be drawn from it; apply `log_softmax` before, or pass `fisher="empirical"`.'
        )
    roots = (_class_weights(arguments, target, p.shape, n) * share).sqrt().unsqueeze(-1)  # [n, s, 1]

    def back(pull: Tensor) -> Tensor:
        """From [n, s, o] to the prediction's shape."""
        pull = pull.reshape(rows.shape)
        return pull.movedim(-1, 1) if scores.ndim > 1 else pull

    def score(labels: Tensor) -> Tensor:
        """Of labels [n, s]; shape [n, s, o]."""
        at = p.clone() if is_logits else torch.zeros_like(p)
        return at.scatter_add_(-1, labels.unsqueeze(-1), -torch.ones_like(p[..., :1]))

    def sampled(generator: torch.Generator) -> Tensor:
        drawn = torch.rand(p.shape[:-1], generator=generator, dtype=p.dtype, device=p.device).unsqueeze(-1)
        totals = p.cumsum(-1)  # no `multinomial`, which stops the process on NaN
        labels = (totals < drawn * totals[..., -1:]).sum(-1).clamp(max=p.shape[-1] - 1)
        return back(score(labels) * roots)

    def exact(j: int) -> Tensor:
        position, label = divmod(j, p.shape[-1])
        labels = torch.full(p.shape[:-1], label, device=p.device)
        at = torch.zeros_like(roots)
        at[:, position] = roots[:, position] * p[:, position, label : label + 1].sqrt()
        return back(score(labels) * at)

    return Predictive(prediction, p.shape[1] * p.shape[2], sampled, exact)


def _class_weights(arguments: Arguments, target: Tensor, shape: torch.Size, n: int) -> Tensor:
    """Of each position, shape [n, s]: what multiplies the curvature of its log-softmax."""
    _, s, o = shape
    of_class = arguments["weight"]
    if of_class is None:
        of_class = torch.ones(o, dtype=arguments["input"].dtype, device=target.device)
    smoothing = arguments.get("label_smoothing", 0.0)
    smoothed = of_class.sum() * smoothing / o
    if target.is_floating_point():  # class probabilities
        rows = target.movedim(1, -1) if target.ndim > 1 else target
        return (rows.reshape(n, s, o) @ of_class) * (1 - smoothing) + smoothed
    labels = target.reshape(n, s)
    is_kept = labels != arguments["ignore_index"]
    return (of_class[labels.where(is_kept, 0)] * (1 - smoothing) + smoothed) * is_kept


# %%
# Elements, each with a distribution of its own


@dataclass(frozen=True, eq=False)
class _Elements:
    """Distributions of elements.

    Args:
        sampled: draws s, of the elements' shape.
        deviation: the square root of E[s^2].
    """

    sampled: Sampled
    deviation: Tensor


def _uniform_like(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _normal(deviation: Tensor) -> _Elements:
    def sampled(generator: torch.Generator) -> Tensor:
        like = deviation
        noise = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
        return noise * deviation

    return _Elements(sampled, deviation)


def _square(arguments: Arguments) -> _Elements:
    return _normal(torch.full_like(arguments["input"], 2.0**0.5))


def _given_variance(arguments: Arguments) -> _Elements:
    given, like = arguments["var"], arguments["input"]
    variance = given if isinstance(given, Tensor) else torch.full_like(like, given)
    if variance.ndim == like.ndim - 1:
        variance = variance.unsqueeze(-1)
    return _normal(variance.clamp(min=arguments["eps"]).rsqrt().expand_as(like))


def _bernoulli_logits(arguments: Arguments) -> _Elements:
    logits = arguments["input"]
    q = logits.sigmoid()
    # sigmoid(f) sigmoid(-f): 1 - q would be zero early
    return _Elements(lambda g: q - (_uniform_like(q, g) < q).to(q), (q * (-logits).sigmoid()).sqrt())


def _bernoulli(arguments: Arguments) -> _Elements:
    q = arguments["input"]
    variance = (q * (1 - q)).clamp(min=TINY)
    return _Elements(lambda g: (q - (_uniform_like(q, g) < q).to(q)) / variance, variance.rsqrt())


def _poisson(arguments: Arguments) -> _Elements:
    is_log = arguments["log_input"]
    rate = arguments["input"].exp() if is_log else arguments["input"] + arguments["eps"]
    safe = rate.nan_to_num(0.0, 0.0, 0.0).clamp(min=0)  # of NaN, `poisson` would stop the process
    if is_log:
        return _Elements(lambda g: rate - torch.poisson(safe, generator=g), rate.sqrt())
    return _Elements(lambda g: 1 - torch.poisson(safe, generator=g) / rate, rate.rsqrt())


_CLASSES = (F.cross_entropy, F.nll_loss)
_ELEMENTS: dict[Callable[..., Tensor], Callable[[Arguments], _Elements]] = {
    F.binary_cross_entropy_with_logits: _bernoulli_logits,
    F.binary_cross_entropy: _bernoulli,
    F.mse_loss: _square,
    F.gaussian_nll_loss: _given_variance,
    F.poisson_nll_loss: _poisson,
}


def _of_elements(call: LossCall, arguments: Arguments, prediction: Tensor, share: Tensor, n: int) -> Predictive:
    """`share`, [] or [n, e], multiplies the weights that the function's arguments give to elements."""
    given = arguments["input"]
    elements = _ELEMENTS[call.function](arguments)
    roots = (_element_weights(arguments, call).expand_as(given).reshape(n, -1) * share).sqrt()  # [n, e]

    def exact(j: int) -> Tensor:
        at = torch.zeros_like(roots)
        at[:, j] = roots[:, j] * elements.deviation.reshape(n, -1)[:, j]
        return at.reshape(given.shape)

    return Predictive(
        prediction, roots.shape[1], lambda g: elements.sampled(g) * roots.reshape(given.shape), exact
    )


def _element_weights(arguments: Arguments, call: LossCall) -> Tensor:
    given, target = arguments["input"], arguments["target"]
    weights = torch.ones_like(given)
    for name in ("weight", "pos_weight"):
        factor = arguments.get(name)
        if factor is not None:
            weights = weights * (factor if name == "weight" else factor * target + (1 - target))
    if torch.broadcast_shapes(target.shape, weights.shape) != given.shape:
        raise LossNotRecognizedError(
            f"{call.name} broadcasts its prediction of shape {tuple(given.shape)} to "
            f"{tuple(torch.broadcast_shapes(target.shape, weights.shape))}; give it and its target one shape."
        )
    return weights
