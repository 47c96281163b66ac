"""Cases of normalizations."""

from __future__ import annotations

import copy

from torch import nn

from tests.layers import case_models as models
from tests.layers.case import Case, Inputs, N, floats


def _with_statistics(model: nn.Module, inputs: Inputs) -> nn.Module:
    """A batch norm in eval mode whose running statistics are those of the batch."""
    held, x = copy.deepcopy(model).eval(), inputs[0]
    assert x is not None
    dims = [0, *range(2, x.ndim)]
    held.running_mean, held.running_var = x.mean(dims), x.var(dims, correction=0)
    return held


def _batch_norms() -> list[Case]:
    kinds = [
        (nn.BatchNorm1d, "[n, c]", (N, 3)),
        (nn.BatchNorm1d, "[n, c, t]", (N, 3, 5)),
        (nn.BatchNorm2d, "", (N, 3, 4, 2)),
        (nn.BatchNorm3d, "", (N, 3, 2, 2, 3)),
    ]
    cases = []
    for kind, flags, shape in kinds:
        name, one = f"nn.{kind.__name__}", len(shape) == 2
        for more, options in {
            "": {},
            "eps=0.1": {"eps": 0.1},
            "no running stats": {"track_running_stats": False},
        }.items():
            make = lambda kind=kind, options=options: kind(3, **options)  # noqa: E731
            named = ", ".join(filter(None, ("training", flags, more)))
            cases.append(Case(name, named, make, floats(shape), hold=_with_statistics, needs_batch=one))
        make = lambda kind=kind: kind(3).eval()  # noqa: E731
        cases.append(Case(name, ", ".join(filter(None, ("eval", flags))), make, floats(shape)))
    return cases


NORMS = [
    Case("nn.LayerNorm", "", lambda: nn.LayerNorm(5), floats((N, 5))),
    Case("nn.LayerNorm", "bias=False", lambda: nn.LayerNorm(5, bias=False), floats((N, 5))),
    Case("nn.LayerNorm", "sequence, eps=0.1", lambda: nn.LayerNorm(5, eps=0.1), floats((N, 7, 5))),
    Case("nn.LayerNorm", "shape [2, 5]", lambda: nn.LayerNorm([2, 5]), floats((N, 3, 2, 5))),
    Case("nn.LayerNorm", "positions first", lambda: nn.LayerNorm(5), floats((7, N, 5)), batch_dim=1),
    Case("nn.RMSNorm", "", lambda: nn.RMSNorm(5), floats((N, 5))),
    Case("nn.RMSNorm", "sequence, eps=0.1", lambda: nn.RMSNorm(5, eps=0.1), floats((N, 7, 5))),
    Case("nn.RMSNorm", "shape [2, 5]", lambda: nn.RMSNorm([2, 5]), floats((N, 3, 2, 5))),
    Case("nn.RMSNorm", "positions first", lambda: nn.RMSNorm(5), floats((7, N, 5)), batch_dim=1),
    Case("transformers LlamaRMSNorm", "", lambda: models.LlamaRMSNorm(5), floats((N, 7, 5))),
    Case("transformers GemmaRMSNorm", "1 + weight", lambda: models.GemmaRMSNorm(5), floats((N, 7, 5))),
    Case("transformers T5LayerNorm", "", lambda: models.T5LayerNorm(5), floats((N, 7, 5))),
    Case("nn.GroupNorm", "[n, c]", lambda: nn.GroupNorm(2, 6), floats((N, 6))),
    Case("nn.GroupNorm", "[n, c, t]", lambda: nn.GroupNorm(3, 6, eps=0.1), floats((N, 6, 5))),
    Case("nn.GroupNorm", "image, one group", lambda: nn.GroupNorm(1, 6), floats((N, 6, 2, 3))),
    *_batch_norms(),
    Case("nn.InstanceNorm1d", "affine", lambda: nn.InstanceNorm1d(3, affine=True), floats((N, 3, 5))),
    Case("nn.InstanceNorm2d", "affine", lambda: nn.InstanceNorm2d(3, affine=True), floats((N, 3, 4, 2))),
    Case(
        "nn.InstanceNorm2d",
        "eval, running stats",
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True).eval(),
        floats((N, 3, 4, 2)),
    ),
]
