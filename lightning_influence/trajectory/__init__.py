"""The gradients of several epochs, added up to one row an example."""

from lightning_influence.trajectory.merge import Merged, Trajectory
from lightning_influence.trajectory.rows import EpochRows, epoch_writer
from lightning_influence.trajectory.stored import merge_segments

__all__ = ["EpochRows", "Merged", "Trajectory", "epoch_writer", "merge_segments"]
