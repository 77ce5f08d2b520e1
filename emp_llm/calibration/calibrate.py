"""Calibration, step by step: samples → units → statistics → scores → masks and repair.

A unit is a decoder block, or a module outside of decoder blocks that holds targets.

Most criteria take one walk through the model. A unit is visited when all samples wait at it:
statistics of its inputs are gathered, its weights are scored, masked and repaired, and the samples
go on with the outputs that it has then. Where gradients are needed, or all scores before the first
mask, a walk through the dense model comes first, and a second one only to repair.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch

from emp_llm.calibration.criterion_registry import find_criterion
from emp_llm.calibration.forward_walk import ForwardWalk
from emp_llm.calibration.gradient_walk import GradientWalk
from emp_llm.calibration.loss_allocation import allocate_by_loss
from emp_llm.calibration.session import Session, recording
from emp_llm.calibration.sinks import MaskSink, ScoreSink
from emp_llm.calibration.statistics import Need, Statistics
from emp_llm.calibration.stored_scores import mask_by_stored_scores
from emp_llm.calibration.target_pruner import TargetPruner
from emp_llm.errors import OptionError
from emp_llm.options import counts_magnitudes
from emp_llm.runtime.team import Team
from emp_llm.selection.allocation import Allocation
from emp_llm.selection.group_numbers import GroupNumbers
from emp_llm.selection.mask_store import MaskStore
from emp_llm.selection.row_block_pass import RowBlockPass
from emp_llm.selection.target_sparsity import measure_groups

if TYPE_CHECKING:
    from pathlib import Path

    from emp_llm.calibration.sinks import Sink
    from emp_llm.calibration.tensor_loading import Change
    from emp_llm.checkpoint.open_files import OpenFiles
    from emp_llm.options import PruneOptions
    from emp_llm.pruning.plan import PruningPlan
    from emp_llm.runtime.workers import Workers
    from emp_llm.tensors.target import Target

__all__ = ["Calibration", "calibrate", "needs_of"]

_REPAIR_NEEDS: dict[str, frozenset[Need]] = {
    "none": frozenset(),
    "obs": frozenset({"hessian"}),
    "swaps": frozenset({"hessian"}),
    "bias": frozenset({"means"}),
}


def needs_of(options: PruneOptions) -> frozenset[Need]:
    """The statistics that the options need; none where they need no data."""
    allocation: frozenset[Need] = frozenset({"hessian"} if options.allocate == "loss" else ())
    return find_criterion(options.criterion).needs | _REPAIR_NEEDS[options.repair] | allocation


def calibrate(plan: PruningPlan, workers: Workers, store: MaskStore) -> float:
    """Make the masks and repaired weights of all targets that a store does not hold yet.

    Args:
        plan: The targets, and the rule.
        workers: The threads and devices that read and count, and their progress.
        store: Takes masks and repaired weights.

    Returns:
        β: the plan's, or the one at which the scores have the target sparsity.

    Raises:
        CheckpointError: If the source cannot be read or run, or has no tokenizer, or an activation,
            weight or score is not finite.
        OptionError: If the calibration's text is too short, or there is nothing to repair, or no β
            gives the target sparsity.
        OSError: If masks or activations cannot be written.
    """
    with plan.source.files(plan.checkpoint.shards) as files, recording():
        session = None
        if needs_of(plan.options):
            session = Session(plan, workers.progress, files, store.folder)
            store.note("calibration", session.samples.description())
        return Calibration(plan, workers, files, session).mask(store)


class Calibration:
    """Masks and repairs by one rule.

    Args:
        plan: The targets, and the rule.
        workers: The threads and devices that read and count, and their progress.
        files: The checkpoint's files.
        session: The model and its samples; None where no data is needed.
    """

    def __init__(
        self, plan: PruningPlan, workers: Workers, files: OpenFiles, session: Session | None
    ) -> None:
        self._plan = plan
        self._workers = workers
        self._files = files
        self._options = options = plan.options
        self._opened_session = session
        self._needs = find_criterion(options.criterion).needs
        self._repair_needs = _REPAIR_NEEDS[options.repair]
        self._units = session.targets if session else _targets_by_unit(plan)
        self._targets = [target for targets in self._units.values() for target in targets]
        self._allocation = Allocation()
        if options.repair == "bias" and not any(map(self._bias_name, self._targets)):
            raise OptionError(
                "repair 'bias' changes the biases of pruned layers, and these have none: choose "
                "--repair obs"
            )

    def changed(self, store: MaskStore) -> Change:
        """Applies the masks and repairs of a store to tensors that are loaded."""
        return self._mask_sink(store, self._options).changed

    def mask(self, store: MaskStore) -> float:
        """Make everything that a store does not hold yet; returns β."""
        options = self._options
        self._allocation = self._allocate(store)
        finds_beta = options.target_sparsity is not None and not counts_magnitudes(options)
        together = finds_beta or options.granularity == "model"
        if not together and "gradient" not in self._needs:
            self._fill(self._mask_sink(store, options), self._needs | self._repair_needs)
            return options.beta
        if options.repair == "none":
            return self._mask_dense(store, options, together=together)
        # all masks first, then a walk on which units are repaired in order
        with MaskStore(store.folder / "masks") as masks:
            only_masks = replace(options, repair="none")
            beta = self._mask_dense(masks, only_masks, together=together)
            self._fill(self._mask_sink(store, options, masks), self._repair_needs)
            for name, value in masks.notes.items():
                store.note(name, value)
        return beta

    def _allocate(self, store: MaskStore) -> Allocation:
        """How many weights each target keeps; noted in a store, for the run when it goes on."""
        if self._options.allocate == "emp":
            return Allocation()
        noted = store.notes.get("allocation")
        if noted is None:
            if self._options.allocate == "loss":
                found = allocate_by_loss(
                    self._plan,
                    self._session,
                    self._files,
                    self._workers.progress,
                    store.folder,
                    self._needs | {"hessian"},
                    self._without_data,
                )
            else:
                sizes = {target.name: math.prod(target.entry.shape) for target in self._targets}
                found = Allocation.uniform(sizes, self._kept_by_emp(store.folder))
            noted = asdict(found)
            store.note("allocation", noted)
        return Allocation(**noted)

    def _kept_by_emp(self, scratch: Path) -> int:
        """How many weights stay by the effective numbers of magnitudes."""
        options, workers = self._options, self._workers
        reading = RowBlockPass(self._files, workers.threads, None, workers.devices)
        with GroupNumbers(scratch) as groups:
            measure_groups(groups, self._targets, options.granularity, reading, Team())
            return groups.counts([options.beta], threads=workers.threads)[0]

    def _mask_dense(self, store: MaskStore, options: PruneOptions, *, together: bool) -> float:
        """Make all masks by the dense model's scores; returns β.

        Args:
            store: Takes the masks.
            options: The rule.
            together: Whether all scores must be there before the first mask is made.
        """
        if not together:
            self._fill(self._mask_sink(store, options), self._needs)
            return options.beta
        # β is noted last: with it, and all masks, an earlier run has finished this step
        beta = store.notes.get("beta")
        if beta is None or not all(map(store.has, self._units)):
            scores = ScoreSink(store.folder, self._pruner(options), options.criterion)
            self._fill(scores, self._needs)
            beta = mask_by_stored_scores(
                scores.paths,
                self._targets,
                options,
                self._files,
                store,
                threads=self._workers.threads,
                devices=self._workers.devices,
            )
            store.note("beta", beta)
            scores.remove()
        return float(beta)

    def _pruner(self, options: PruneOptions, masks: MaskStore | None = None) -> TargetPruner:
        device = self._opened_session.device if self._opened_session else torch.device("cpu")
        return TargetPruner(options, self._files, device, masks, self._allocation)

    def _mask_sink(
        self, store: MaskStore, options: PruneOptions, masks: MaskStore | None = None
    ) -> MaskSink:
        return MaskSink(store, self._pruner(options, masks), self._units, self._bias_to_repair)

    def _fill(self, sink: Sink, needs: frozenset[Need]) -> None:
        """Have a sink process every unit, with the statistics that it needs."""
        if all(map(sink.has, self._units)):
            return
        if "gradient" in needs:
            GradientWalk(self._session, self._units, sink, self._without_data).run()
        elif needs:
            repairs = isinstance(sink, MaskSink) and "hessian" in self._repair_needs & needs
            # without `sequential` every unit has the dense model's inputs anyway
            paired = repairs and self._session.options.sequential
            ForwardWalk(
                self._session, self._units, sink, needs, self._without_data, paired=paired
            ).run()
        # units that no sample has come to, or all of them where no data is needed
        for unit in self._units:
            if not sink.has(unit):
                sink.process(unit, self._units[unit], self._without_data)

    def _bias_name(self, target: Target) -> str | None:
        """The bias of a target's layer, if the target is one matrix with a bias of its own."""
        geometry = target.geometry
        if geometry.matrices > 1:
            return None
        return self._session.model.map.bias_of(target.name, geometry.matrix_rows)

    def _bias_to_repair(self, target: Target) -> tuple[str, torch.Tensor] | None:
        name = self._bias_name(target) if self._options.repair == "bias" else None
        return None if name is None else (name, self._session.model.read(name))

    @property
    def _session(self) -> Session:
        if self._opened_session is None:
            raise RuntimeError("criterion and repair need data, and no session was opened for it")
        return self._opened_session

    def _without_data(self, target: Target, matrix: int) -> Statistics:
        """What is known of a matrix without data."""
        calibration = self._options.calibration
        return Statistics(
            tensor=target.name,
            matrix=matrix,
            first_row=matrix * target.geometry.matrix_rows,
            seed=calibration.seed if calibration else 0,
        )


def _targets_by_unit(plan: PruningPlan) -> dict[str, list[Target]]:
    """The targets of each decoder block; a target outside of them is a unit of its own."""
    units: dict[str, list[Target]] = {}
    for target in plan.all_targets:
        unit = plan.decisions[target.name].block or target.name
        units.setdefault(unit, []).append(target)
    return units
