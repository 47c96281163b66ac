"""The errors of this package: one base class, one child for each thing that a caller can act on.

Every message names the argument, layer or file, what was expected, what was found and what to do.
"""


class InfluenceError(Exception):
    """Base class of every error that this package raises on purpose."""


class CaptureError(InfluenceError):
    """Capture cannot go on; training can."""


class LossNotRecognizedError(CaptureError):
    """No loss whose scale is known was seen, or several that cannot be combined."""


class RowIndexError(CaptureError):
    """The rows of a batch cannot be tied to dataset indices."""


class LayerError(CaptureError):
    """A layer's per-example gradients cannot be had, or are not exact."""


class UnsupportedTrainingError(CaptureError):
    """This way of training is not supported."""


class OtherProcessError(CaptureError):
    """Another of the processes that train together cannot go on with capture, so none of them can."""


class StoreError(InfluenceError):
    """A file of captured gradients cannot be written or read."""


class StoreNotFoundError(StoreError):
    """There is no file where one was expected."""


class NotAStoreError(StoreError):
    """The file is not HDF5, or is not one of ours."""


class SchemaVersionError(StoreError):
    """The file was written in a schema that this version cannot read."""


class IncompleteStoreError(StoreError):
    """The file was never finished: training or capture ended early."""


class CorruptStoreError(StoreError):
    """The file is truncated, or its shapes, counts or checksums do not fit together."""


class WeightsMismatchError(InfluenceError):
    """The model's weights are not those that the file was captured for."""


class QueryError(InfluenceError):
    """The question cannot be answered as it was put."""
