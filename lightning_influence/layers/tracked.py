"""One attributed matrix of parameters, the modules that use it, and how their calls become its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_influence.errors import LayerError
from lightning_influence.functional.structure import KroneckerStructure
from lightning_influence.gradients import DenseGradient, FactoredGradient, LayerGradient, RowGradient
from lightning_influence.layers.base import LayerAdapter, LayerCall
from lightning_influence.layers.linear import outer_products

LARGEST_FACTOR = 8192  # a side longer than this gets a diagonal factor: eigh takes minutes, and grows cubically


@dataclass(frozen=True)
class Source:
    """A module that uses the matrix.

    Args:
        name: the module's, in the model.
        module: the layer.
        adapter: for its type.
        has_bias: whether the module's bias is the matrix's last column.
    """

    name: str
    module: nn.Module
    adapter: LayerAdapter
    has_bias: bool


@dataclass(frozen=True)
class LinearUse:
    """A use of the matrix, or of some of its rows, by `F.linear`.

    Args:
        layer_input: shape [..., i].
        output_grad: d loss / d output, shape [..., rows].
        first_row: of the rows that were used.
        has_bias: whether a bias was added.
        batch_dim: the examples' dimension; None if it is the layer's.
    """

    layer_input: Tensor
    output_grad: Tensor
    first_row: int
    has_bias: bool
    batch_dim: int | None


@dataclass(frozen=True)
class TrackedLayer:
    """A matrix of parameters [o, i] that is attributed: a weight and, as its last column, a bias.

    Args:
        sources: the modules that use it; several if they share the weight.
        has_bias: whether the last column is that of a trainable bias.
        batch_dim: the dimension of inputs and outputs that counts examples; 1 where positions come first.
    """

    sources: tuple[Source, ...]
    has_bias: bool
    batch_dim: int = 0

    @property
    def module(self) -> nn.Module:
        """The first module that uses the matrix."""
        return self.sources[0].module

    @property
    def adapter(self) -> LayerAdapter:
        """That module's adapter."""
        return self.sources[0].adapter

    def of_copy(self, model: nn.Module) -> TrackedLayer:
        """The same layer in a copy of the model."""
        sources = tuple(replace(source, module=model.get_submodule(source.name)) for source in self.sources)
        return replace(self, sources=sources)

    @property
    def is_trainable(self) -> bool:
        """Whether its weight or bias wants a gradient now."""
        return any(parameter.requires_grad for parameter in self.parameters.values())

    @property
    def has_grad(self) -> bool:
        """Whether there is a gradient other than zero in `.grad`."""
        grads = [parameter.grad for parameter in self.parameters.values()]
        return any(grad is not None and (grad.is_sparse or bool(grad.any())) for grad in grads)

    @property
    def calls_are_all(self) -> bool:
        """Whether the modules' own calls are all uses of the weight that are to be expected.

        Not so inside of attention, and not for a table, which an output layer may share without a module.
        """
        return all(source.adapter.is_called and not source.adapter.is_table for source in self.sources)

    @property
    def shape(self) -> tuple[int, int]:
        """The gradient's shape (o, i), the bias's column included."""
        o, i = self.adapter.shape(self.module)
        return o, i + self.has_bias

    @property
    def ends_in_ones(self) -> bool:
        """Whether the last column is a bias that is added to every output position, in all uses."""
        usual = all(type(source.adapter).append_bias is LayerAdapter.append_bias for source in self.sources)
        return self.has_bias and usual and all(source.has_bias for source in self.sources)

    def with_bias(self, has_bias: bool) -> TrackedLayer:
        """The same layer with its bias, or without."""
        if has_bias == self.has_bias:
            return self
        sources = tuple(replace(source, has_bias=source.has_bias and has_bias) for source in self.sources)
        return replace(self, sources=sources, has_bias=has_bias and any(source.has_bias for source in sources))

    @property
    def weight_elements(self) -> int:
        """Parameters in the matrix without the bias."""
        o, i = self.adapter.shape(self.module)
        return o * i

    @property
    def bias_owner(self) -> Source:
        """The source whose bias is the last column."""
        return next(source for source in self.sources if source.has_bias)

    @property
    def structure(self) -> KroneckerStructure:
        """Which Kronecker factors the Fisher block has: diagonal where one user needs it, or a side is long."""
        structures = [source.adapter.structure(source.module) for source in self.sources]
        o, i = self.shape
        return KroneckerStructure(
            structures[0].groups,
            full_A=i <= LARGEST_FACTOR and all(structure.full_A for structure in structures),
            full_S=o // structures[0].groups <= LARGEST_FACTOR
            and all(structure.full_S for structure in structures),
        )

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the matrix is of, by their names in the module; not always all of each."""
        found = {"weight": _parameter(self.module, self.adapter.weight_name)}
        if self.has_bias:
            owner = self.bias_owner
            found["bias"] = _parameter(owner.module, owner.adapter.bias_name)
        return found

    def matrix(self, values: Mapping[str, Tensor | None]) -> Tensor:
        """Values for `parameters`, such as their `.grad`, as a matrix [o, i]; zeros where there is None."""
        parameters = self.parameters
        filled = {
            name: torch.zeros_like(p) if (v := values.get(name)) is None else v for name, p in parameters.items()
        }
        weight = self.adapter.matrix(self.module, filled["weight"])
        if not self.has_bias:
            return weight
        owner = self.bias_owner
        column = owner.adapter.bias_column(owner.module, filled["bias"])
        return torch.cat([weight, column.unsqueeze(1)], dim=1)

    def gradient(self, use: LinearUse | tuple[int, LayerCall]) -> LayerGradient:
        """Per-example gradients of one use of the matrix.

        Args:
            use: by `F.linear`, or the number of a source and the call of its module.

        Raises:
            LayerError: if the input has no dimension for examples.
        """
        if isinstance(use, LinearUse):
            return self._of_linear(use)
        number, call = use
        source, call = self.sources[number], self._batch_first(call)
        gradient = source.adapter.gradient_of_call(source.module, call)
        if source.has_bias:
            return source.adapter.append_bias(source.module, gradient, call)
        return _without_bias(gradient) if self.has_bias else gradient

    def _batch_first(self, call: LayerCall) -> LayerCall:
        if self.batch_dim == 0:
            return call
        moved = [
            value.movedim(self.batch_dim, 0)
            if isinstance(value, Tensor) and value.ndim > self.batch_dim
            else value
            for value in (*call.args, *call.kwargs.values())
        ]
        kwargs = dict(zip(call.kwargs, moved[len(call.args) :], strict=True))
        output_grad = call.output_grad.movedim(self.batch_dim, 0)
        return LayerCall(tuple(moved[: len(call.args)]), kwargs, output_grad, call.memory)

    def _of_linear(self, use: LinearUse) -> LayerGradient:
        batch_dim = self.batch_dim if use.batch_dim is None else use.batch_dim
        if use.layer_input.ndim <= batch_dim + 1:
            raise LayerError(f"expected inputs with a batch dimension, got shape {tuple(use.layer_input.shape)}.")
        gradient = outer_products(use.layer_input.movedim(batch_dim, 0), use.output_grad.movedim(batch_dim, 0))
        after = self.shape[0] - use.first_row - gradient.shape[0]
        if after or use.first_row:
            gradient = FactoredGradient(gradient.inputs, pad(gradient.output_grads, (use.first_row, after)))
        if not self.has_bias:
            return gradient
        return gradient.with_ones() if use.has_bias else _without_bias(gradient)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    """By its name, which may lead into submodules; torch's own way is slow for what each call of a layer asks."""
    found = module._parameters.get(name)
    return module.get_parameter(name) if found is None else found


def _without_bias(gradient: LayerGradient) -> LayerGradient:
    """A column of zeros, for a use without the bias that another use of the matrix has."""
    if isinstance(gradient, FactoredGradient):
        return FactoredGradient(pad(gradient.inputs, (0, 1)), gradient.output_grads)
    if isinstance(gradient, RowGradient):
        return RowGradient(gradient.num_rows, gradient.rows, pad(gradient.grads, (0, 1)))
    return DenseGradient(pad(gradient.dense(), (0, 1)))
