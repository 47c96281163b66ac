"""Eigenbases for the rows to come, from the covariances of the epoch before."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from lightning_influence.factors import KroneckerCovariance
from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.gradients import LayerGradient
from lightning_influence.layer_plan import LayerPlan
from lightning_influence.processes import Processes
from lightning_influence.training.batch_capture import CapturedBatch, Wanted
from lightning_influence.training.options import CaptureOptions


class BasisPreparation:
    """Sums the covariances of the layers that need a basis before their rows can be written.

    Args:
        options: what the user asked for: with labels of the model's own, they are of gradients that `add_labels`
            is given, and not of the batches' own.

    Attributes:
        bases: those that were made, by layer.
    """

    def __init__(self, options: CaptureOptions) -> None:
        self.bases: dict[str, Eigenbasis] = {}
        self._has_own_labels = options.label_source is not None
        self._positions = options.covariance_positions
        self._covariances: dict[str, KroneckerCovariance] = {}

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing that a resumed run would need."""
        return not self.bases and not self._covariances

    def start_epoch(self) -> None:
        """Sum up anew; the bases stay."""
        self._covariances = {}

    def wanted(self, plans: Mapping[str, LayerPlan]) -> Wanted:
        """Of a batch: nothing but its part of the covariances, which is added at once."""
        names = [name for name, plan in plans.items() if plan.needs_basis]
        if self._has_own_labels:
            return Wanted(dict.fromkeys(names, _nothing_of), names, partial(self.add_labels, plans))
        return Wanted({name: partial(self._add, name, plans[name]) for name in names}, names)

    def add_labels(self, plans: Mapping[str, LayerPlan], gradients: Mapping[str, LayerGradient]) -> None:
        """Take in a pass under labels that are not the batch's."""
        for name, plan in plans.items():
            if plan.needs_basis and name in gradients:
                self._add(name, plan, gradients[name])

    def add(self, batch: CapturedBatch, plans: Mapping[str, LayerPlan]) -> None:
        """Take in a batch of whose gradients more was wanted."""
        if self._has_own_labels:
            for gradients in batch.labels:
                self.add_labels(plans, gradients)
            return
        for name, add in self.wanted(plans).reduce.items():
            add(batch.step.gradients[name])

    def finish(self, plans: Mapping[str, LayerPlan], processes: Processes) -> None:
        """After an epoch's last batch: make the bases, in all processes together."""
        metrics = {name: self._covariance(name, plan) for name, plan in plans.items() if plan.needs_basis}
        if not processes.is_alone:
            processes.sum_(t for metric in metrics.values() for t in metric.to(processes.device).sums)
        made: dict[str, Eigenbasis] = {}
        with processes.together():
            if processes.is_first:
                made = {name: metric.eigenbasis() for name, metric in metrics.items()}
        self.share(made, processes)
        self._covariances = {}

    def share(self, made: Mapping[str, Eigenbasis], processes: Processes) -> None:
        """Take the first process's bases, in all processes together."""
        if not processes.is_alone:  # devices differ
            made = processes.from_first({name: basis.to("cpu") for name, basis in made.items()})
        self.bases |= made

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, in plain tensors."""
        return {
            "bases": {name: dict(vars(basis.to("cpu"))) for name, basis in self.bases.items()},
            "covariances": {
                name: [t.detach().cpu().clone() for t in m.sums] for name, m in self._covariances.items()
            },
        }

    def load(self, state: Mapping[str, Any], plans: Mapping[str, LayerPlan]) -> None:
        """Go on from a state.

        Raises:
            ValueError: if a layer has another shape now.
        """
        for name, plan in plans.items():
            if name in state["bases"]:
                basis = Eigenbasis(**state["bases"][name])
                if basis.shape != plan.shape:
                    raise ValueError(f"Layer {name!r} has shape {plan.shape}, but its basis {basis.shape}.")
                self.bases[name] = basis
            if name in state["covariances"]:
                self._covariance(name, plan).load_sums(state["covariances"][name])

    def _covariance(self, name: str, plan: LayerPlan) -> KroneckerCovariance:
        if name not in self._covariances:
            self._covariances[name] = KroneckerCovariance(
                plan.shape, plan.structure, positions=self._positions, sync_on_compute=False
            )
        return self._covariances[name]

    def _add(self, name: str, plan: LayerPlan, gradient: LayerGradient) -> LayerGradient:
        self._covariance(name, plan).to(gradient.device).update(gradient.finite())
        return gradient[:0]


def _nothing_of(gradient: LayerGradient) -> LayerGradient:
    return gradient[:0]
