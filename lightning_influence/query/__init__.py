"""Answers from a file: scores, top-k, self-influence, groups; see `query.engine`."""

from lightning_influence.query.answers import Attribution, GroupAttribution
from lightning_influence.query.budget import MEMORY_BUDGET, parse_bytes
from lightning_influence.query.engine import InfluenceQuery
from lightning_influence.query.groups import Groups
from lightning_influence.query.options import DEFAULT_DAMPING, QueryOptions, ScoreOptions
from lightning_influence.query.places import Subset
from lightning_influence.query.segment import described_layers

__all__ = [
    "DEFAULT_DAMPING",
    "MEMORY_BUDGET",
    "Attribution",
    "GroupAttribution",
    "Groups",
    "InfluenceQuery",
    "QueryOptions",
    "ScoreOptions",
    "Subset",
    "described_layers",
    "parse_bytes",
]
