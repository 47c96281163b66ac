"""A fingerprint of a model's weights, by which a file of gradients knows its checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over every parameter in name order: name, shape and float32 bytes.

    Buffers are left out (running statistics move in a mere forward), and dtypes are widened to
    float32, so that a bfloat16 model equals its checkpoint loaded in float32.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> before = weights_hash(layer)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> before == weights_hash(layer), len(before)
        (False, 64)
    """
    return parameters_hash(dict(model.named_parameters()))


def parameters_hash(parameters: Mapping[str, Tensor]) -> str:
    """The same of parameters by name, as of those that a checkpoint holds among its other values."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        values = parameter.detach().to("cpu", torch.float32).contiguous()
        digest.update(values.numpy().data)
    return digest.hexdigest()
