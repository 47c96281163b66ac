"""A small finished file, and the pieces to write others."""

from pathlib import Path

import numpy as np

from lightning_influence.store import ArraySpec, StoreWriter

N = 7
LAYERS = {
    "encoder.0.linear": {
        "input": ArraySpec(shape=(3, 5), dtype="f2"),
        "output_grad": ArraySpec(shape=(3, 2), dtype="f4"),
    },
    "head": {"scale": ArraySpec(shape=(), dtype="f8")},
}
FACTORS = {
    "encoder.0.linear": {
        "Q_A": np.arange(25, dtype=np.float32).reshape(5, 5),
        "count": np.array(9, dtype=np.int64),
    }
}
DOCUMENTS = {"versions": {"torch": "2.6"}, "coverage": [1, None, "é"]}
ATTRIBUTES = {"epoch": 4, "damping": 0.5, "is_exact": True, "weights_hash_end": "änd", "note": ""}


def random_arrays(n: int, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Rows `[n, ...]` for every array of `LAYERS`."""
    generator = np.random.default_rng(seed)
    return {
        layer: {
            name: generator.standard_normal((n, *spec.shape)).astype(spec.dtype) for name, spec in arrays.items()
        }
        for layer, arrays in LAYERS.items()
    }


def write_file(path: Path, segment: int = 0, after: Path | None = None) -> Path:
    """A finished file with every row but 2 written."""
    writer = StoreWriter(path, num_examples=N, store_id="0123456789abcdef", segment=segment, after=after)
    writer.create(LAYERS)
    indices = np.array([6, 0, 3, 5, 1, 4])
    columns = {"valid": np.ones(6, bool), "loss": np.linspace(0, 1, 6)}
    writer.write_rows(indices, columns=columns, arrays=random_arrays(6))
    return writer.finish(attributes=ATTRIBUTES, documents=DOCUMENTS, factors=FACTORS)
