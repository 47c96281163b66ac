"""`InfluenceModule`: asks a file of captured gradients, with the model that they belong to."""

from lightning_influence.module.influence import InfluenceModule

__all__ = ["InfluenceModule"]
