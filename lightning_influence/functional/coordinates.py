"""Some of a gradient's coordinates in the eigenbasis, without making the others.

Coordinates that carry much lie in few rows and columns of Q_S^T G Q_A, so only these are rotated: r of the o
output directions and c of the i input directions. Of the r c products few are wanted: a leading row's with many
columns, a late one's with the first few. So of large layers, rows that need about as many columns are multiplied
together; of others all products are made, which is cheaper than to copy rows and columns together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.gradients import FactoredGradient, LayerGradient, RowGradient, chunk_elements

COPIED = 128  # multiply-adds that take about as long as copying one number


class CoordinateSelection:
    """Chosen coordinates of gradients in one eigenbasis.

    Args:
        basis: of shape (o, i).
        kept: int64 [k], places in the flattened [o, i].
    """

    def __init__(self, basis: Eigenbasis, kept: Tensor) -> None:
        self.basis, self.kept = basis, kept
        i = basis.shape[1]
        self._rows, row_of = (kept // i).unique(return_inverse=True)  # [r], [k]
        self._columns, column_of = (kept % i).unique(return_inverse=True)  # [c], [k]
        self._places = row_of * len(self._columns) + column_of  # in the flattened [r, c]
        self._row_of, self._column_of = row_of, column_of
        self._blocks, self._block_places = _blocks_of(row_of, column_of)
        self._products = sum(len(rows) * len(columns) for rows, columns in self._blocks)
        copied = sum(len(rows) + len(columns) for rows, columns in self._blocks)
        if len(self._rows) * len(self._columns) <= self._products + COPIED * copied:
            self._blocks, self._products = [], len(self._rows) * len(self._columns)
        self._is_grouped = basis.eigenvalues_S.ndim > 1
        if not self._is_grouped:
            self._Q_A = None if basis.Q_A is None else basis.Q_A[:, self._columns].contiguous()
            self._Q_S = None if basis.Q_S is None else basis.Q_S[:, self._rows].contiguous()

    def of(self, gradient: LayerGradient) -> Tensor:
        """The coordinates of each example, shape [n, k]."""
        if not self._is_grouped and isinstance(gradient, RowGradient) and self._Q_S is None:
            return self._of_rows(gradient)
        found = self.basis.eigenvalues_A.new_empty(len(gradient), len(self.kept))
        if self._is_grouped:
            for rows, dense in gradient.dense_chunks():
                found[rows] = self.basis.rotate_dense(dense).flatten(1)[:, self.kept]
        elif isinstance(gradient, FactoredGradient) and self._is_cheaper_by_factors(gradient):
            for rows in self._chunks(gradient):
                self._of_factors(gradient[rows], found[rows])
        else:
            for rows, dense in gradient.dense_chunks():
                found[rows] = self._of_dense(dense)
        return found

    def _of_factors(self, gradient: FactoredGradient, found: Tensor) -> None:
        """Write the coordinates [n, k] of gradients to `found`."""
        inputs = gradient.inputs[..., self._columns] if self._Q_A is None else gradient.inputs @ self._Q_A
        grads = gradient.output_grads[..., self._rows] if self._Q_S is None else gradient.output_grads @ self._Q_S
        if gradient.positions == 1 and len(self.kept) < len(self._rows) * len(self._columns):
            torch.index_select(grads[:, 0], 1, self._row_of, out=found)
            found *= inputs[:, 0].index_select(1, self._column_of)
            return
        if not self._blocks:
            torch.index_select((grads.mT @ inputs).flatten(1), 1, self._places, out=found)
            return
        products = [
            (grads.index_select(2, rows).mT @ inputs.index_select(2, columns)).flatten(1)
            for rows, columns in self._blocks
        ]
        torch.index_select(torch.cat(products, dim=1), 1, self._block_places, out=found)

    def _of_dense(self, dense: Tensor) -> Tensor:
        """Of gradients [n, o, i], the side first that makes them smaller."""
        r, c, (o, i) = len(self._rows), len(self._columns), self.basis.shape
        if r * i * (o + c) <= o * c * (i + r):
            rotated = self._columns_of(self._rows_of(dense))
        else:
            rotated = self._rows_of(self._columns_of(dense))
        return rotated.flatten(1).index_select(1, self._places)

    def _rows_of(self, dense: Tensor) -> Tensor:
        return dense[:, self._rows] if self._Q_S is None else self._Q_S.T @ dense

    def _columns_of(self, dense: Tensor) -> Tensor:
        return dense[..., self._columns] if self._Q_A is None else dense @ self._Q_A

    def _of_rows(self, gradient: RowGradient) -> Tensor:
        """Of a table, in which most examples look up few of the chosen rows."""
        examples, rows, grads = gradient.combined()
        place_of_row = torch.full((gradient.num_rows,), -1, device=rows.device)
        place_of_row[self._rows] = torch.arange(len(self._rows), device=rows.device)
        inside = place_of_row[rows] >= 0
        values = grads.new_zeros(len(gradient), len(self._rows), len(self._columns))
        values[examples[inside], place_of_row[rows[inside]]] = self._columns_of(grads[inside])
        return values.flatten(1)[:, self._places]

    def _is_cheaper_by_factors(self, gradient: FactoredGradient) -> bool:
        """Whether rotating s positions takes fewer multiply-adds than rotating their sum."""
        s, r, c, (o, i) = gradient.positions, len(self._rows), len(self._columns), self.basis.shape
        by_factors = s * (self._products + o * r * (self._Q_S is not None) + i * c * (self._Q_A is not None))
        return by_factors <= s * o * i + min(r * i * (o + c), o * c * (i + r))

    def _chunks(self, gradient: FactoredGradient) -> list[slice]:
        """As many examples at a time as their coordinates take 64 MB."""
        elements = self._products + gradient.positions * (len(self._rows) + len(self._columns))
        step = max(1, chunk_elements(gradient.device) // elements)
        return [slice(start, start + step) for start in range(0, len(gradient), step)]


def _blocks_of(row_of: Tensor, column_of: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Rectangles of rows and columns that hold all wanted places.

    Args:
        row_of: int64 [k], the wanted places' rows, counted from 0 without gaps.
        column_of: int64 [k], their columns, likewise.

    Returns:
        Each rectangle's rows and columns, and int64 [k]: where in the flattened rectangles, one after the other,
        the wanted places are.
    """
    counts = row_of.bincount()  # columns that each row needs
    level_of = counts.double().log2().floor().long().div(2, rounding_mode="floor")[row_of]  # [k]: 1-3, 4-15, ...
    blocks, places, start = [], torch.empty_like(row_of), 0
    for level in level_of.unique():
        inside = level_of == level
        rows, row_in = row_of[inside].unique(return_inverse=True)
        columns, column_in = column_of[inside].unique(return_inverse=True)
        places[inside] = start + row_in * len(columns) + column_in
        start += len(rows) * len(columns)
        blocks.append((rows, columns))
    return blocks, places
