"""`InfluenceModule`: asks a file of captured gradients, with the model that they belong to."""

from lightning_influence.module.attribution_writer import AttributionWriter
from lightning_influence.module.ensemble import InfluenceEnsemble
from lightning_influence.module.influence import InfluenceModule

__all__ = ["AttributionWriter", "InfluenceEnsemble", "InfluenceModule"]
