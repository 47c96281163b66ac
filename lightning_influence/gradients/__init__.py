"""Per-example gradients of one layer, in the form in which they are cheapest."""

from lightning_influence.gradients.base import CHUNK_ELEMENTS, LayerGradient, chunk_elements
from lightning_influence.gradients.convolution import ConvGradient, TransposedConvGradient
from lightning_influence.gradients.dense import Coordinates, DenseGradient
from lightning_influence.gradients.encoded import EncodedGradient
from lightning_influence.gradients.factored import BiasedGradient, FactoredGradient
from lightning_influence.gradients.geometry import ConvGeometry
from lightning_influence.gradients.lent import LentGradient
from lightning_influence.gradients.rows import RowGradient
from lightning_influence.gradients.summed import SummedGradient, add_calls, concatenate

__all__ = [
    "CHUNK_ELEMENTS",
    "BiasedGradient",
    "ConvGeometry",
    "ConvGradient",
    "Coordinates",
    "DenseGradient",
    "EncodedGradient",
    "FactoredGradient",
    "LayerGradient",
    "LentGradient",
    "RowGradient",
    "SummedGradient",
    "TransposedConvGradient",
    "add_calls",
    "chunk_elements",
    "concatenate",
]
