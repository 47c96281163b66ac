"""Wrote `schema_v5.h5` and `schema_v5.json`. Never run again: old files open for ever, as they are."""

import json
from pathlib import Path

import numpy as np

from lightning_influence.codecs import EigenCodec, allocate
from lightning_influence.codecs.tiers import tier_of
from lightning_influence.curvature import HeuristicDamping
from lightning_influence.factors import EigenvalueCorrection, KroneckerCovariance
from lightning_influence.functional.weights import weights_hash
from lightning_influence.layer_plan import plan_layers
from lightning_influence.layer_record import describe_layers
from lightning_influence.layers import track_layers
from lightning_influence.query import InfluenceQuery
from lightning_influence.row_file import specs
from lightning_influence.scoring import ScoredLayer
from lightning_influence.store import StoreReader, StoreWriter
from tests.golden.make_schema_v1 import captured, golden_batch, golden_net

__all__ = ["captured", "golden_batch", "golden_net", "main"]

FOLDER = Path(__file__).parent
CURVATURES = ("ekfac", "kfac", "identity")


def main() -> None:
    """Rows 0 to 17 of 20, with tiers of coordinates."""
    net = golden_net()
    gradients = captured(net, 18).gradients(18).gradients
    tracked, coverage = track_layers(net)
    layers, arrays = {}, {}
    for name, gradient in gradients.items():
        covariance = KroneckerCovariance(gradient.shape)
        covariance.update(gradient)
        basis = covariance.eigenbasis()
        correction = EigenvalueCorrection(basis)
        correction.update(gradient)
        chosen = allocate({name: correction.compute()}, 10**6)[name]
        sizes = {8: 4, 4: 5, 2: len(chosen.coordinates) - 9}
        tiers = [tier_of(bits, size) for bits, size in sizes.items()]
        codec = EigenCodec(basis, chosen.coordinates, chosen.whitening, tiers)
        layers[name] = ScoredLayer(basis, correction.compute(), codec)
        arrays[name] = {key: array.numpy() for key, array in layers[name].codec.encode(gradient).items()}
    writer = StoreWriter(FOLDER / "schema_v5.h5", num_examples=20, store_id="0123456789abcdef", segment=5)
    writer.create({name: specs(layer.codec) for name, layer in layers.items()})
    writer.write_rows(np.arange(18), columns={"valid": np.ones(18, np.uint8)}, arrays=arrays)
    writer.finish(
        attributes={"epoch": 5, "weights_hash_end": weights_hash(net)},
        documents={
            "coverage": coverage.to_builtins(),
            "loss": {},
            "layers": describe_layers(plan_layers(tracked, gradients, "eigen"), layers),
        },
        factors={name: layer.to_arrays() for name, layer in layers.items()},
    )
    query = InfluenceQuery(StoreReader(FOLDER / "schema_v5.h5"))
    asked = captured(net, 2, first=40).gradients(2).gradients
    answers = {
        curvature: query.scores(asked, damping=HeuristicDamping(), curvature=curvature).tolist()
        for curvature in CURVATURES
    }
    (FOLDER / "schema_v5.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
