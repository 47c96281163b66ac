"""What the writer puts into the file, checked and in the bytes of the format."""

import json

import h5py
import numpy as np

from lightning_influence.store.schema import (
    MAX_ATTRIBUTE_BYTES,
    MAX_DOCUMENT_BYTES,
    RESERVED_ATTRIBUTES,
    check_name,
    stored_dtype,
)


def encode_text(text: str) -> np.ndarray:
    """A string of fixed length: HDF5 keeps the others in a heap that has no checksum."""
    encoded = text.encode()
    return np.array(encoded, dtype=h5py.string_dtype("utf-8", max(len(encoded), 1)))


def encode_value(value: bool | int | float | str) -> np.ndarray:
    """What an attribute holds, as a scalar array."""
    return encode_text(value) if isinstance(value, str) else np.array(value)


def encode_attribute(name: str, value: bool | int | float | str) -> np.ndarray:
    """A root attribute of the caller's, as a scalar array.

    Raises:
        ValueError: if its name, type or size is not the format's.
    """
    check_name("attribute", name)
    if name in RESERVED_ATTRIBUTES:
        raise ValueError(f"attribute {name!r} belongs to the format; choose another name.")
    if not isinstance(value, bool | int | float | str):
        raise ValueError(
            f"attribute {name!r} must be Python's bool, int, float or str, got {type(value)}; "
            "convert it or make it a document."
        )
    if isinstance(value, str) and (len(value.encode()) > MAX_ATTRIBUTE_BYTES or "\0" in value):
        raise ValueError(
            f"attribute {name!r} must be at most {MAX_ATTRIBUTE_BYTES} bytes without NUL, "
            f"got {len(value.encode())} bytes; make it a document."
        )
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"attribute {name!r} must fit 64 bits, got {value}; make it a string.")
    return encode_value(value)


def encode_document(name: str, document: object) -> np.ndarray:
    """A document as JSON, u1 of shape [bytes].

    Raises:
        ValueError: if it is not made of JSON's types, or too long.
    """
    check_name("document", name)
    try:
        text = json.dumps(document).encode()
    except (TypeError, ValueError, RecursionError) as err:
        raise ValueError(f"document {name!r} must be made of JSON's types: {err}.") from err
    if len(text) > MAX_DOCUMENT_BYTES:
        raise ValueError(
            f"document {name!r} must be at most {MAX_DOCUMENT_BYTES} bytes of JSON, "
            f"got {len(text)}; make it an array."
        )
    return np.frombuffer(text, np.uint8)


def encode_factor(layer: str, name: str, array: np.ndarray) -> np.ndarray:
    """A factor little-endian and contiguous, of unchanged shape.

    Raises:
        ValueError: if its name or dtype is not the format's, or if it is empty.
    """
    check_name(f"factor of layer {layer!r}:", name)
    try:
        dtype = stored_dtype(array.dtype)
    except ValueError as err:
        raise ValueError(f"factor {name!r} of layer {layer!r}: {err}") from err
    if not array.size:
        raise ValueError(
            f"factor {name!r} of layer {layer!r} must not be empty, got shape {array.shape}; leave it out."
        )
    return np.asarray(array, dtype=dtype, order="C")


def check_indices(indices: np.ndarray, num_examples: int) -> None:
    """Refuse indices that are not of rows.

    Raises:
        ValueError: if they are no vector of integers, or out of range.
    """
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise ValueError(f"`indices` must be integers of shape [n], got {indices.dtype} {indices.shape}.")
    outside = indices[(indices < 0) | (indices >= num_examples)]
    if outside.size:
        raise ValueError(
            f"`indices` must lie in 0..{num_examples - 1}, got {outside[:5].tolist()}; "
            "`num_examples` must be the length of the dataset."
        )


def check_rows(name: str, rows: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Refuse rows that the dataset `name` has no place for.

    Raises:
        ValueError: if the shape or dtype is another.
    """
    # A column converts between kinds of integer or float; a codec gives what it declared.
    fits = np.can_cast(rows.dtype, dtype, "same_kind" if name.startswith("rows/") else "equiv")
    if rows.shape != shape or not fits:
        raise ValueError(f"{name!r} must be {dtype} of shape {shape}, got {rows.dtype} of shape {rows.shape}.")
    if name == "rows/occurrences" and not ((rows >= 0) & (rows < 2**31)).all():
        raise ValueError(f"{name!r} must be counts from 0 below 2**31, got {rows.min()}..{rows.max()}.")
