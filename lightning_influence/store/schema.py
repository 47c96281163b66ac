"""The file format, schema version 5.

One HDF5 file holds one training run: per-example gradients of ``N`` dataset rows, by layer, of one
captured epoch or of several. Each captured epoch is a segment; the root is the one captured last.

Layout
    ======================================  ==================================================
    root attributes                         ``format`` = "lightning-influence",
                                            ``schema_version`` = 5, ``complete``, ``store_id``,
                                            ``num_examples`` = N, ``segment`` = the root's number,
                                            and what the run adds
    ``/rows/<column>``                      ``[N]``, one value per dataset index
    ``/documents/<name>``                   ``[bytes]`` u1: one JSON document in UTF-8
    ``/layers/<layer>/factors/<name>``      any shape: ``Q_A``, ``Q_S``, ``Lambda``, ...
    ``/layers/<layer>/rows/<name>``         ``[N, ...]``, one row per dataset index
    ``/segments/<number>``                  a segment captured before: ``rows``, ``documents``
                                            and ``layers`` as in the root, and the attributes
                                            that its root had
    ======================================  ==================================================

    Columns: ``written`` u1, ``valid`` u1, ``loss`` f4 (NaN: unknown), ``step`` i8 (-1: unknown),
    ``learning_rate`` f4 (NaN: unknown), ``label`` i8 (-1: unknown), ``occurrences`` i4 (how often
    the epoch trained on the example; the row is that of the last time). Others may follow.

Rules
    - Row ``k`` of every column and row array MUST belong to dataset index ``k``. It means
      something only where ``written[k]`` is 1; an unwritten row holds zeros.
    - A segment's number, an integer from 0 below 10^18, MUST be unique in the file. In ``/segments`` it
      is the group's name in decimal, without leading zeros, and its attribute ``segment``.
    - A segment's ``format``, ``complete``, ``store_id`` and ``num_examples`` MUST equal the root's. Its
      ``schema_version`` is that of the file that it was captured in, and says how to read it.
    - Layers MAY differ from segment to segment.
    - Datasets MUST be little-endian f2, f4, f8, i1, u1, i4 or i8, not empty, contiguous and
      without filters, so that a reader can map them at their offset in the file.
    - Every dataset MUST have an attribute ``crc32``: ``zlib.crc32`` of its bytes.
    - Root attributes MUST be scalars: bool, integer, float or fixed-length UTF-8 string of at
      most 32 KiB. Anything with structure is a document, of at most 16 MiB.
    - Names MUST NOT be empty, be "." or contain "/" or NUL. Dots are fine: "encoder.0.linear".
    - Links MUST be hard links. No virtual datasets, no external storage, no pickles.
    - ``complete`` is set last. A file being written has another name, which ends in ".partial";
      one at its final name is complete.
    - Readers ignore members and attributes of the root and of segments that they do not know.

Checked on opening, of every segment: the format, version and ``complete``; every dataset's link, type, shape,
layout and place inside the file; N against every column and row array; checksums of columns and
documents. Checked when read: checksums of factors. Checked only by ``StoreReader.verify_rows``:
checksums of row arrays, which are most of the file. HDF5 itself checks its metadata.

NOT checked: that the values are finite or make sense, and who wrote them. A checksum finds
accidents, not forgery. Truncating a file while it is mapped ends the reading process (SIGBUS).

What a captured run adds
    Attributes: ``epoch`` (counted from 0), ``step_start``, ``step_end`` (optimizer steps),
    ``weights_hash_start`` and ``weights_hash_end`` (SHA-256, ``functional.weights``), ``fisher``, ``loss``,
    ``fisher_samples``, ``effective_samples_S`` and ``effective_samples_Lambda`` (unless it is "empirical"),
    ``rows`` ("online": each row at the weights of its step; "final": all at those of the end), ``rows_written``,
    ``rows_invalid``, ``rows_missing``, ``bytes_per_row``, ``batches_captured`` (in the first process) and
    ``batches_planned`` (of the epoch; -1: unknown), ``is_resumed`` (within this epoch, of which rows may then be
    missing), ``is_whole`` (false if resumed, or cut short in a run without a whole epoch), ``processes`` (that
    trained together), ``staleness_spearman`` (NaN: not measured,
    ``staleness_note`` says why), ``codec_spearman`` (measured with it). Files whose ``rows`` are "final" count no
    batches; those of ``capture``, which knows of no training, have no ``epoch``, step, ``is_resumed`` or
    ``processes`` either. Files older than ``rows`` are "online". Rows that are merged from several epochs have
    ``trajectory`` = "merge" and ``epochs_merged``; ``epoch`` is the last of them, ``step_start`` and
    ``weights_hash_start`` are the first's, ``weights_hash_end`` is of the weights when training ended, and
    ``occurrences`` count over all of them. The document ``trajectory`` then has the ``weighting`` and, of each
    of the ``epochs``, its number ``epoch``, the ``weights`` by layer, and the epoch's own facts. A row is the
    sum of weight times occurrences times gradient over the epochs, divided by the sum of the weights
    (``trajectory.merge``). Documents: ``layers``
    (in the model's order: name, ``has_bias``, ``batch_dim``, ``structure``, codec, its config),
    ``coverage``, ``loss``, ``versions`` and, of runs that were captured in training, ``penalties``: by layer, the
    ``optimizer``, its ``weight_decay``, and the factors l of the penalties l/2 |w|^2 on each example that act as
    this ``decay`` and as the end of training (``stopping``) did, null where not known (``training.penalties``).

    A layer is a matrix of parameters, whose gradient G is ``[o, i]`` for an example; its name is the
    module's, with a last part where the module has several ("attention.in_proj"). ``batch_dim`` is the
    dimension of the layer's inputs that counts examples. Factors: ``Q_A`` ``[i, i]`` and ``Q_S`` ``[o, o]``
    (eigenvectors in columns), ``eigenvalues_A`` ``[i]``, ``eigenvalues_S`` ``[o]`` (descending),
    ``Lambda`` ``[o, i]``. ``structure`` says where they differ: with g ``groups`` of outputs, of which each
    has a basis of its own, they are ``[g, i, i]``, ``[g, o/g, o/g]``, ``[g, i]`` and ``[g, o/g]``; without
    ``full_A`` or ``full_S`` that side is not rotated: there is no Q, and its values are in the order of the
    parameters.
    Entries of ``Lambda`` at coordinates that no row of ``eigen`` keeps are those of the first examples only.
    Layers with codec ``eigen`` add ``coordinates`` ``[k]`` i8 and ``whitening`` ``[k]`` f4. The config
    of ``pairs`` is ``positions``, ``has_bias`` and ``dtype``, that of ``dense`` is ``dtype``; that of
    ``eigen`` is ``tiers``: a list of [bits, how many of the coordinates], in order. The attribute
    ``loss`` is what the user asked for ("auto", "mean" or "sum"), the document ``loss`` what was seen:
    ``function``, ``reduction``, ``count``, the ``constant`` divided out, and ``terms``.
    ``fisher`` says of which labels the gradients are that the factors are moments of: "empirical", those of the
    training set, as the rows always are; "sampled", ``fisher_samples`` drawn from what the model predicts;
    "exact", the expectation over all labels. The effective sample sizes (``fisher.effective_size``) are those of
    the layer with the smallest; the document ``fisher`` has them by layer, and the seconds that it took.
    A row with ``written`` = 1 and ``valid`` = 0 had a non-finite gradient and is in no factor.

Codecs
    How the arrays under ``/layers/<layer>/rows`` turn into the gradient G ``[o, i]`` of an
    example's own loss. The document ``layers`` names each layer's codec.

    ``pairs``: G = sum over positions s of ``output_grads[s]`` ``inputs[s]``^T. With ``has_bias`` a 1 is
    appended to ``inputs[s]``, and the last column of G is the bias's. By the config's ``dtype``:
    int8: entry k is its code times ``<name>_scales[s, k // 64]``; float16: times
    ``<name>_scales[s, 0]``; float32: as it is. Padded positions have zero output gradients.

    ``dense``: the row-major flattened G is ``values``, rounded as in ``pairs``.

    ``eigen``: z[j] times the factor ``whitening[j]`` is the entry ``coordinates[j]`` of the row-major flattened
    Q_S^T G Q_A; all other entries count as 0. The coordinates are those of one tier after the other, of which each
    has arrays of its own; j counts from its start. With 8 bits, z[j] is entry j of ``codes_8`` (i1) times
    ``scales_8[j // 64]``. With b = 4 or 2 bits, ``codes_<b>`` (u1) holds 8 / b codes a byte, the first in the
    lowest bits; (code - (2^b - 1) / 2) times ``scales_<b>[j // 256]`` are the entries of z, padded with zeros to
    a multiple of 64, after each 64 of them were multiplied by the Hadamard matrix (Sylvester's) over 8.

Versions 1 to 4 open for ever. Version 4 had one number of bits for all coordinates of an ``eigen`` layer, in the
config as ``bits``; the arrays were ``codes`` and ``scales``, and rotated ones were padded to a multiple of 256.
Version 3 and older had 8 ``bits`` only, and the config of ``eigen`` was empty.
Versions 1 and 2 had no ``/segments``, no ``segment`` (it is the attribute ``epoch``
if that is an integer from 0, else 0) and no ``occurrences`` (they are ``written``). Version 1 had no
``batch_dim`` (0), no ``structure`` (one group, both sides full) and no ``dense``.

Reading it with h5py alone. A file to read:

    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from lightning_influence.store import ArraySpec, StoreWriter
    >>> writer = StoreWriter(
    ...     Path(tempfile.mkdtemp()) / "run.h5", num_examples=3, store_id="0123456789abcdef"
    ... )
    >>> writer.create({"encoder.0": {"input": ArraySpec(shape=(2,), dtype="f4")}})
    >>> writer.write_rows(
    ...     np.array([2, 0]),
    ...     columns={"valid": np.ones(2, np.uint8)},
    ...     arrays={"encoder.0": {"input": np.array([[1, 2], [3, 4]], np.float32)}},
    ... )
    >>> path = writer.finish(
    ...     attributes={"epoch": 4}, documents={"versions": {"torch": "2.6"}}, factors={}
    ... )

and all there is to it:

    >>> import h5py
    >>> import json
    >>> with h5py.File(path) as file:
    ...     assert file.attrs["format"] == b"lightning-influence" and file.attrs["complete"]
    ...     versions = json.loads(file["documents/versions"][()].tobytes())
    ...     written = file["rows/written"][()].astype(bool)
    ...     inputs = file["layers/encoder.0/rows/input"][()]
    >>> versions, written.tolist(), inputs[written].tolist()
    ({'torch': '2.6'}, [True, False, True], [[3.0, 4.0], [1.0, 2.0]])
"""

import math
from dataclasses import dataclass

import numpy as np

FORMAT = "lightning-influence"
SCHEMA_VERSION = 5
READABLE_VERSIONS = frozenset({1, 2, 3, 4, 5})
SEGMENTS_SINCE = 3  # the first version with segments and occurrences
MAX_SEGMENT = 10**18 - 1
DTYPES = frozenset({"f2", "f4", "f8", "i1", "u1", "i4", "i8"})
MAX_ATTRIBUTE_BYTES = 32 * 1024
MAX_DOCUMENT_BYTES = 16 * 1024 * 1024
RESERVED_ATTRIBUTES = frozenset({"format", "schema_version", "complete", "store_id", "num_examples", "segment"})

# Column: (dtype, value where nothing is known).
COLUMNS: dict[str, tuple[str, float]] = {
    "written": ("u1", 0),
    "valid": ("u1", 0),
    "loss": ("f4", math.nan),
    "step": ("i8", -1),
    "learning_rate": ("f4", math.nan),
    "label": ("i8", -1),
    "occurrences": ("i4", 0),
}


def stored_dtype(dtype: np.dtype | str) -> np.dtype:
    """The little-endian dtype that the file holds for `dtype`.

    Raises:
        ValueError: if the format has no such dtype.
    """
    found = np.dtype(dtype)
    if found.str[1:] not in DTYPES:
        raise ValueError(
            f"dtype {found} cannot be stored; the file holds {', '.join(sorted(DTYPES))}: convert it."
        )
    return found.newbyteorder("<")


def check_name(what: str, name: str) -> None:
    """Refuse a name that HDF5 would read as a path.

    Raises:
        ValueError: naming `what` is badly named.
    """
    if name in ("", ".") or "/" in name or "\0" in name:
        raise ValueError(f"{what} {name!r} must not be empty, be '.' or contain '/' or NUL; rename it.")


@dataclass(frozen=True)
class ArraySpec:
    """One example's part of a row array.

    Args:
        shape: shape of one row, without the leading N; `()` is one number a row.
        dtype: one of `DTYPES`, in any spelling that NumPy knows.

    Example:
        >>> ArraySpec(shape=(16, 64), dtype="f2").nbytes
        2048
    """

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        stored_dtype(self.dtype)
        if any(size < 1 for size in self.shape):
            raise ValueError(f"`shape` must have positive sizes only, got {self.shape}.")

    @property
    def nbytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize
