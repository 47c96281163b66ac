"""Wrote `schema_v3.h5` and `schema_v3.json`. Never run again: old files open for ever, as they are."""

import json
from pathlib import Path

import numpy as np
from torch import nn

from lightning_influence.curvature import HeuristicDamping
from lightning_influence.functional.weights import weights_hash
from lightning_influence.layer_plan import plan_layers
from lightning_influence.layers import track_layers
from lightning_influence.query import InfluenceQuery
from lightning_influence.recorder import Recorder
from lightning_influence.step import StepCapture
from lightning_influence.store import StoreReader, StoreWriter
from tests.golden.make_schema_v1 import Net, golden_batch, scattered

__all__ = ["EARLIER", "LATEST", "captured", "golden_batch", "golden_net", "main"]

FOLDER = Path(__file__).parent
EARLIER, LATEST = 3, 5  # epochs; in the earlier one only the head was trained
CURVATURES = ("ekfac", "kfac", "identity")


def golden_net(epoch: int = LATEST) -> Net:
    """Weights that are the same bits on every machine."""
    net, start = Net(), epoch
    for parameter in net.parameters():
        parameter.data = scattered(start, start + parameter.numel()).view_as(parameter)
        start += parameter.numel()
    net.tokens.requires_grad_(epoch == LATEST)
    return net


def captured(net: Net, n: int, first: int = 0, indices: list[int] | None = None) -> StepCapture:
    """One step over n examples from the first on, or over those of `indices`."""
    x, y = golden_batch(n, first)
    chosen = list(range(n)) if indices is None else indices
    capture = StepCapture(track_layers(net)[0])
    with capture:
        nn.functional.cross_entropy(net(x[chosen]), y[chosen]).backward()
    return capture


def record(epoch: int, codec: str, after: Path | None) -> None:
    """One epoch; in it, 18 examples were drawn once and the first of them a second time."""
    path, net = FOLDER / "schema_v3.h5", golden_net(epoch)
    indices = [*range(18), 0]
    step = captured(net, 18, indices=indices).gradients(19)
    layers, coverage = track_layers(net)
    plans = plan_layers(layers, step.gradients, codec)  # type: ignore[arg-type]
    writer = StoreWriter(path, num_examples=20, store_id="0123456789abcdef", segment=epoch, after=after)
    recorder = Recorder(writer, plans, bytes_per_example=16)
    recorder.update(step, np.array(indices), step_index=epoch, learning_rate=0.1)
    recorder.finish(
        recorder.factors(),
        attributes={"epoch": epoch, "weights_hash_end": weights_hash(net)},
        documents={"coverage": coverage.to_builtins(), "loss": recorder.loss},
    )


def main() -> None:
    record(EARLIER, "pairs-float16", after=None)
    record(LATEST, "eigen", after=FOLDER / "schema_v3.h5")
    answers: dict[str, dict[str, list]] = {}
    for epoch in (EARLIER, LATEST):
        query = InfluenceQuery(StoreReader(FOLDER / "schema_v3.h5", epoch))
        asked = captured(golden_net(epoch), 2, first=40).gradients(2).gradients
        for curvature in CURVATURES:
            scores = query.scores(asked, damping=HeuristicDamping(0.1), curvature=curvature)
            answers.setdefault(str(epoch), {})[curvature] = scores.tolist()
    (FOLDER / "schema_v3.json").write_text(json.dumps({**answers[str(LATEST)], "earlier": answers[str(EARLIER)]}))


if __name__ == "__main__":
    main()
