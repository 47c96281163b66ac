"""The contract of a curvature, and the registry of those that a query can name.

A curvature is a matrix for each layer. It is diagonal in some Kronecker basis, by default in the layer's
eigenbasis; that of the rows' own Fisher matrix gets its rows' part on top (see `RowCurvature`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor

from lightning_influence.curvature.damping import Damping
from lightning_influence.functional.kronecker import Eigenbasis


class Curvature(Protocol):
    """A block-diagonal curvature matrix that is diagonal in a Kronecker basis of each layer.

    That is the layer's eigenbasis, unless the curvature has the method `basis(eigenbasis) -> Eigenbasis`, which
    gives another.
    """

    def inverse_eigenvalues(self, basis: Eigenbasis, Lambda: Tensor, damping: Damping) -> Tensor:
        """Eigenvalues of the damped inverse, shape [o, i].

        Args:
            basis: the layer's eigenbasis.
            Lambda: EK-FAC's eigenvalues in it, shape [o, i].
            damping: the rule for what is added.
        """


def basis_of(curvature: Curvature, eigenbasis: Eigenbasis) -> Eigenbasis:
    """The basis of a layer that a curvature is diagonal in."""
    own = getattr(curvature, "basis", None)
    return eigenbasis if own is None else own(eigenbasis)


class LayerRows(Protocol):
    """The valid rows of one layer, n of k coordinates in an orthonormal basis, in float64.

    Attributes:
        name: of layer and file, for messages.
        count: n.
        width: k.
    """

    name: str
    count: int
    width: int

    def gram(self) -> Tensor:
        """Inner products of all rows, shape [n, n], not to be changed."""

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Some rows at a time: which, and their coordinates [m, k]."""


class RowsPart(Protocol):
    """What the rows of one layer make of scores that a curvature's diagonal part alone gave."""

    def scores(self, diagonal: Tensor) -> Tensor:
        """Scores under the whole matrix of scores [q, n] under its diagonal part, float64 [q, n]."""

    def self_influence(self) -> Tensor:
        """Each row's score for itself, float64 [n]."""


@runtime_checkable
class RowCurvature(Curvature, Protocol):
    """A diagonal part, whose inverse is `inverse_eigenvalues`, plus a sum over the rows."""

    def rows_part(self, rows: LayerRows, Lambda: Tensor, damping: Damping) -> RowsPart:
        """The rows' part of one layer."""


_CURVATURES: dict[str, Curvature] = {}


def register_curvature(name: str, curvature: Curvature) -> None:
    """Make a curvature known under a name."""
    _CURVATURES[name] = curvature


def get_curvature(curvature: str | Curvature) -> Curvature:
    """A curvature by name, or one's own as it is.

    Raises:
        ValueError: if no curvature has that name.
    """
    if not isinstance(curvature, str):
        return curvature
    if curvature not in _CURVATURES:
        raise ValueError(f"`curvature` must be one of {sorted(_CURVATURES)}, got {curvature!r}.")
    return _CURVATURES[curvature]
