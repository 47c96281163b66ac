"""Every kind of layer with every flag: what `layer_table` prints and `test_every_layer` checks.

What cannot be attributed is in `uncovered`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from tests.layers import case_models as models
from tests.layers.case import Case, N, and_then, floats
from tests.layers.norm_cases import NORMS
from tests.layers.table_cases import TABLES

# --- Linear -------------------------------------------------------------------------------------------

_LINEAR = [
    Case("nn.Linear", "", lambda: nn.Linear(5, 3), floats((N, 5))),
    Case("nn.Linear", "bias=False", lambda: nn.Linear(5, 3, bias=False), floats((N, 5))),
    Case("nn.Linear", "frozen bias", models.linear_with_frozen_bias, floats((N, 5))),
    Case("nn.Linear", "sequence", lambda: nn.Linear(5, 3), floats((N, 7, 5))),
    Case("nn.Linear", "image", lambda: nn.Linear(5, 3), floats((N, 2, 3, 5))),
    Case("nn.Linear", "positions first", lambda: nn.Linear(5, 3), floats((7, N, 5)), batch_dim=1),
    Case("nn.Linear", "LoRA on a frozen one", models.Lora, floats((N, 7, 5))),
    Case("transformers Conv1D", "", lambda: models.Conv1D(3, 5), floats((N, 5))),
    Case("transformers Conv1D", "sequence", lambda: models.Conv1D(3, 5), floats((N, 7, 5))),
    Case("transformers Conv1D", "positions first", lambda: models.Conv1D(3, 5), floats((7, N, 5)), batch_dim=1),
]

# --- Convolutions -------------------------------------------------------------------------------------

_SIZES = {1: (9,), 2: (7, 6), 3: (5, 4, 6)}
_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def _conv(
    dims: int, flags: str, *, channels: tuple[int, int] = (4, 6), kernel: object = 3, **options: object
) -> Case:
    kind = _CONVS[dims]
    make = lambda: kind(*channels, kernel, **options)  # noqa: E731
    return Case(f"nn.{kind.__name__}", flags, make, floats((N, channels[0], *_SIZES[dims])))


_CONVOLUTIONS = [
    *(
        _conv(dims, flags, **options)
        for dims in (1, 2, 3)
        for flags, options in {
            "": {},
            "bias=False": {"bias": False},
            "kernel 1": {"kernel": 1},
            "stride=2, padding=1": {"stride": 2, "padding": 1},
            "dilation=2, padding=2": {"dilation": 2, "padding": 2},
            "groups=2": {"groups": 2},
            "depthwise, multiplier 2": {"channels": (4, 8), "groups": 4, "padding": 1},
            "valid": {"padding": "valid"},
            "same, even kernel": {"padding": "same", "kernel": 2},
            "same, dilation=2": {"padding": "same", "dilation": 2},
            "reflect": {"padding": 1, "padding_mode": "reflect"},
            "replicate, stride=2": {"padding": 2, "padding_mode": "replicate", "stride": 2},
            "circular, same": {"padding": "same", "padding_mode": "circular", "kernel": 2},
        }.items()
    ),
    _conv(2, "unequal sizes", kernel=(3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)),
    _conv(
        2, "all at once", channels=(4, 8), kernel=(2, 3), stride=2, padding=1, groups=2, padding_mode="circular"
    ),
    *(
        Case("nn.ConvTranspose1d", flags, lambda o=options: nn.ConvTranspose1d(4, 6, 3, **o), floats((N, 4, 5)))
        for flags, options in {
            "": {},
            "bias=False, stride=2": {"bias": False, "stride": 2},
            "output_padding=1, padding=1, stride=2": {"stride": 2, "padding": 1, "output_padding": 1},
            "groups=2, dilation=2": {"groups": 2, "dilation": 2},
        }.items()
    ),
    *(
        Case("nn.ConvTranspose2d", flags, lambda o=options: nn.ConvTranspose2d(4, 6, 3, **o), floats((N, 4, 4, 3)))
        for flags, options in {
            "": {},
            "groups=2": {"groups": 2},
            "output_padding=1, padding=1, stride=2": {"stride": 2, "padding": 1, "output_padding": 1},
            "groups=2, stride=2, dilation=2": {"groups": 2, "stride": 2, "dilation": 2, "bias": False},
        }.items()
    ),
    Case("nn.ConvTranspose3d", "stride=2", lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), floats((N, 2, 3, 2, 2))),
]

# --- Attention ----------------------------------------------------------------------------------------

_PADDING = torch.arange(6) >= torch.tensor([6, 3, 5, 1]).unsqueeze(1)  # [n, 6], true where there is nothing
_CAUSAL = torch.ones(6, 6, dtype=torch.bool).triu(1)
_SEQUENCE = {True: (N, 6, 4), False: (6, N, 4)}


def _self_attention(flags: str, *others: Tensor | None, batch_first: bool = True, **options: object) -> Case:
    dims = (0 if batch_first else 1, 0, None)[: 1 + len(others)]
    return Case(
        "nn.MultiheadAttention",
        ", ".join(filter(None, ("" if batch_first else "positions first", flags))),
        lambda: models.SelfAttention(batch_first=batch_first, **options),
        and_then(floats(_SEQUENCE[batch_first]), *others),
        dims=dims,
        batch_dim=dims[0],
    )


def _cross_attention(flags: str, *, batch_first: bool = True, **options: object) -> Case:
    dim, k, v = int(not batch_first), options.get("kdim", 4), options.get("vdim", 4)
    shapes = [(N, 5, 4), (N, 6, k), (N, 6, v)]
    shapes = shapes if batch_first else [(t, n, width) for n, t, width in shapes]
    return Case(
        "nn.MultiheadAttention",
        ", ".join(filter(None, ("" if batch_first else "positions first", flags))),
        lambda: models.CrossAttention(batch_first=batch_first, **options),
        floats(*shapes),
        dims=(dim,) * 3,
        batch_dim=dim,
    )


def _transformer_layers(batch_first: bool, norm_first: bool) -> list[Case]:
    options = {"dim_feedforward": 6, "dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first}
    flags = f"{'batch' if batch_first else 'positions'} first{', norm_first' if norm_first else ''}"
    dim, sequence = int(not batch_first), _SEQUENCE[batch_first]
    encoder, decoder = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer
    memory = (N, 5, 4) if batch_first else (5, N, 4)
    return [
        Case(
            "nn.TransformerEncoderLayer",
            flags,
            lambda: encoder(4, 2, **options),
            and_then(floats(sequence), None, _PADDING),
            dims=(dim, None, 0),
            batch_dim=dim,
        ),
        Case(
            "nn.TransformerEncoderLayer",
            f"eval, {flags}",
            lambda: encoder(4, 2, **options).eval(),
            and_then(floats(sequence), _CAUSAL),
            dims=(dim, None),
            batch_dim=dim,
        ),
        Case(
            "nn.TransformerDecoderLayer",
            flags,
            lambda: decoder(4, 2, **options),
            floats(sequence, memory),
            batch_dim=dim,
        ),
    ]


_ATTENTION = [
    *(
        case
        for first in (True, False)
        for case in (
            _self_attention("self", batch_first=first),
            _self_attention("self, bias=False", batch_first=first, bias=False),
            _self_attention("self, key_padding_mask", _PADDING, batch_first=first),
            _self_attention("self, attn_mask", None, _CAUSAL, batch_first=first),
            _self_attention(
                "self, both masks, no weights", _PADDING, _CAUSAL, batch_first=first, need_weights=False
            ),
            _cross_attention("q != k = v", batch_first=first, shares_key=True),
            _cross_attention("q, k, v differ", batch_first=first),
            _cross_attention("kdim, vdim", batch_first=first, kdim=3, vdim=5),
            _cross_attention("kdim, vdim, bias=False", batch_first=first, kdim=3, vdim=5, bias=False),
        )
    ),
    _self_attention("self, eval", is_training=False),
    _self_attention("self, eval, key_padding_mask", _PADDING, is_training=False),
    _self_attention("self, add_zero_attn", add_zero_attn=True),
    replace(_self_attention("self, add_bias_kv", add_bias_kv=True), reason="bias_k, bias_v: not part of"),
    *(case for first in (True, False) for norm in (True, False) for case in _transformer_layers(first, norm)),
    Case("nn.TransformerEncoder", "2 layers", models.encoder, floats(_SEQUENCE[True])),
]

CASES = [*_LINEAR, *_CONVOLUTIONS, *TABLES, *NORMS, *_ATTENTION]
