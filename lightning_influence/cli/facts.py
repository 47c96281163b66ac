"""What a file says of itself, as plain values and as text. Nothing of a model is needed.

Counts and sizes are taken from the columns and arrays themselves, not from the attributes that repeat them
(`checking` compares the two).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_influence.cli.tables import table
from lightning_influence.errors import CorruptStoreError
from lightning_influence.fisher import describe_fisher
from lightning_influence.layers import Coverage
from lightning_influence.query import DEFAULT_DAMPING, described_layers
from lightning_influence.segments import mean_learning_rate
from lightning_influence.store import StoreReader
from lightning_influence.training.report import STALE_BELOW
from lightning_influence.training.staleness import FINE

_HASH_DIGITS = 16
_FISHER_FACTS = ("fisher_samples", "effective_samples_S", "effective_samples_Lambda")  # not of the empirical one


def facts_of(store: StoreReader) -> dict[str, Any]:
    """Everything that `info` tells, in plain values; what a file does not say is None or NaN.

    Raises:
        CorruptStoreError: if a document cannot be read.
    """
    try:
        segments = [_segment(store.segment(number)) for number in store.segments]
        versions = {**_document(store, "versions", {})}
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptStoreError(
            f"{store.path}: a document cannot be read: {type(error).__name__}: {error}. Restore a copy or capture "
            "again."
        ) from error
    return {
        "file": str(store.path),
        "bytes": store.path.stat().st_size,
        "schema_version": store.attributes["schema_version"],
        "store_id": store.store_id,
        "num_examples": store.num_examples,
        "versions": versions,
        "segments": segments,
    }


def counts_of(store: StoreReader) -> dict[str, int]:
    """Rows and their bytes, under the names of the attributes that claim them."""
    written, valid = (store.column(name).astype(bool) for name in ("written", "valid"))
    return {
        "rows_written": int(written.sum()),
        "rows_invalid": int((written & ~valid).sum()),
        "rows_missing": int((~written).sum()),
        "bytes_per_row": sum(_row_bytes(store, layer) for layer in store.layers),
    }


def _row_bytes(store: StoreReader, layer: str) -> int:
    return sum(array.nbytes // store.num_examples for array in store.rows(layer).values())


def _segment(store: StoreReader) -> dict[str, Any]:
    attributes = store.attributes
    names = ("epoch", "step_start", "step_end", "is_resumed", "processes", "batches_captured", "batches_planned")
    coverage = Coverage.from_builtins(_document(store, "coverage", []))
    return {
        "segment": store.number,
        **counts_of(store),
        **{name: attributes.get(name) for name in names},
        "is_whole": attributes.get("is_whole", True),
        "rows": attributes.get("rows", "online"),
        "merged_epochs": _merged_epochs(store),
        "merged_by": _document(store, "trajectory", {}).get("weighting"),
        "learning_rate": mean_learning_rate(store),
        "weights_sha256": attributes.get("weights_hash_end"),
        "staleness_spearman": attributes.get("staleness_spearman", math.nan),
        "staleness_note": attributes.get("staleness_note", ""),
        "codec_spearman": attributes.get("codec_spearman", math.nan),
        "fisher": attributes.get("fisher"),
        **{name: attributes[name] for name in _FISHER_FACTS if name in attributes},
        "loss": _document(store, "loss", {}),
        "coverage": coverage.share if coverage.layers else None,
        "not_attributed": [
            {
                "name": layer.name,
                "type": layer.type,
                "parameters": layer.parameters - layer.covered,
                "reason": layer.reason,
            }
            for layer in coverage.uncovered
        ],
        "layers": _layers(store),
    }


def _merged_epochs(store: StoreReader) -> list[dict[str, Any]]:
    """The merged epochs, each with the mean of its weights over layers; none if nothing was merged."""
    if store.attributes.get("trajectory") != "merge":
        return []
    epochs = _document(store, "trajectory", {"epochs": []})["epochs"]
    return [{"epoch": each["epoch"], "weight": float(np.mean([*each["weights"].values()]))} for each in epochs]


def _layers(store: StoreReader) -> list[dict[str, Any]]:
    """Codec, size and eigenvalues of each layer; Lambda is read where it lies, the larger factors are not."""
    Lambdas = {name: array for name, array, _ in store.datasets() if name.endswith("/factors/Lambda")}
    entries = []
    for entry in described_layers(store):
        Lambda = Lambdas.get(f"layers/{entry['name']}/factors/Lambda", np.zeros((0, 0), np.float32))
        mean = float(Lambda.mean(dtype=np.float64)) if Lambda.size else math.nan
        config = entry.get("config", {})
        entries.append(
            {
                "name": entry["name"],
                "codec": entry["codec"],
                "precision": config.get("dtype") or f"int{config.get('bits', 8)}",
                "gradient": list(Lambda.shape),
                "bytes_per_row": _row_bytes(store, entry["name"]),
                "mean_eigenvalue": mean,
                "largest_eigenvalue": float(Lambda.max()) if Lambda.size else math.nan,
                "default_damping": DEFAULT_DAMPING.factor * mean,
                "structure": entry.get("structure", {}),
            }
        )
    return entries


def _document(store: StoreReader, name: str, instead: Any) -> Any:
    known = {key for key, _, _ in store.datasets()}
    return store.document(name) if f"documents/{name}" in known else instead


def text_of(found: Mapping[str, Any]) -> str:
    """The facts of `facts_of` for people."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    *earlier, last = found["segments"]
    lines = [
        f"{found['file']}: {megabytes(found['bytes'])}, {found['num_examples']:,} examples, schema version "
        f"{found['schema_version']}" + (f", written with {versions}" if versions else ""),
        f"  rows: {last['rows_written']:,} written, {last['rows_invalid']:,} invalid, "
        f"{last['rows_missing']:,} missing; {last['bytes_per_row']:,} bytes each",
        f"  captured: {_origin(last)}",
        f"  weights: {_weights(last)}",
        f"  staleness: {_staleness(last)}",
        f"  codec: {_agreement(last['codec_spearman'], FINE, 'stored and exact rows')}",
        f"  loss: {_loss(last['loss'])}; {describe_fisher(last) if last['fisher'] else 'unknown Fisher'}, EK-FAC",
        *_coverage(last),
        *(f"  {line}" for line in _layer_table(last["layers"]).splitlines()),
    ]
    lines += [
        f"  earlier segment {each['segment']}: {each['rows_written']:,} rows, {_origin(each)}; {_weights(each)}"
        for each in earlier
    ]
    return "\n".join(lines)


def megabytes(size: int) -> str:
    """A size for people."""
    return f"{size / 1e6:,.1f} MB"


def _origin(segment: Mapping[str, Any]) -> str:
    if segment["rows"] == "final":
        return "by one pass after training, in eval mode, at the final weights"
    if segment["merged_epochs"]:
        epochs = ", ".join(f"{each['epoch']} ({each['weight']:.2g})" for each in segment["merged_epochs"])
        by = "equally" if segment["merged_by"] == "equal" else "by these learning rates"
        text = f"epochs {epochs}, merged {by} for the final weights"
    elif segment["epoch"] is None:
        text = "it is not known when"
    else:
        text = f"in epoch {segment['epoch']}"
        if segment["step_start"] is not None:
            text += f", optimizer steps {segment['step_start']} to {segment['step_end']}"
        if not math.isnan(segment["learning_rate"]):
            text += f", mean learning rate {segment['learning_rate']:.3g}"
    if not segment["is_whole"]:
        text += "; a part of it: it was resumed, or cut short"
    return text


def _weights(segment: Mapping[str, Any]) -> str:
    found, step = segment["weights_sha256"], segment["step_end"]
    if found is None:
        return "unknown"
    return f"SHA-256 {found[:_HASH_DIGITS]}…" + ("" if step is None else f", at optimizer step {step}")


def _staleness(segment: Mapping[str, Any]) -> str:
    value = segment["staleness_spearman"]
    if math.isnan(value) and segment["staleness_note"]:
        return f"not measured ({segment['staleness_note']})"
    return _agreement(value, STALE_BELOW, "rows as captured and at the final weights")


def _agreement(value: float, low: float, of: str) -> str:
    if math.isnan(value):
        return "not measured"
    warning = f" (below {low}: see the README)" if value < low else ""
    return f"Spearman {value:.3f} between scores of {of}{warning}"


def _loss(loss: Mapping[str, Any]) -> str:
    terms = loss.get("terms") or []
    return " + ".join(f"{term['function']} ({term['reduction']})" for term in terms) or "unknown"


def _coverage(segment: Mapping[str, Any]) -> list[str]:
    if segment["coverage"] is None:
        return ["  coverage: unknown"]
    return [
        f"  coverage: {segment['coverage']:.1%} of the trainable parameters are attributed",
        *(
            f"    not {each['name'] or '(the model itself)'} ({each['type']}, {each['parameters']:,} parameters): "
            f"{each['reason']}"
            for each in segment["not_attributed"]
        ),
    ]


def _layer_table(layers: list[dict[str, Any]]) -> str:
    return table(
        [
            {
                "layer": layer["name"],
                "codec": f"{layer['codec']} {layer['precision']}",
                "gradient": " x ".join(map(str, layer["gradient"])),
                "bytes": layer["bytes_per_row"],
                "mean eigenvalue": layer["mean_eigenvalue"],
                "largest": layer["largest_eigenvalue"],
            }
            for layer in layers
        ]
    )
