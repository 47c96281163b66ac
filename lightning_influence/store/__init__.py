"""The file of captured gradients: one HDF5 file a training run, described in `store.schema`.

This package knows NumPy arrays and JSON only; what the arrays mean is the codecs' business.
"""

from lightning_influence.store.reader import StoreReader
from lightning_influence.store.schema import COLUMNS, ArraySpec
from lightning_influence.store.writer import StoreWriter

__all__ = ["COLUMNS", "ArraySpec", "StoreReader", "StoreWriter"]
