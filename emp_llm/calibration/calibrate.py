"""All decisions from data, in order: samples → blocks → statistics → scores → masks → repair.

Most criteria are one walk through the model. A block is visited when all samples wait at it: its
inputs are gathered, its weights scored, pruned and repaired, and the samples go on with what it
gives then. Where gradients are needed, or all scores before the first weight goes, a walk through
the dense model comes first, and a second one only to repair.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from emp_llm.calibration.backward_walk import Backward
from emp_llm.calibration.criterion_registry import find_criterion
from emp_llm.calibration.forward_walk import Forward, unchanged
from emp_llm.calibration.masks import decide_together
from emp_llm.calibration.session import Session, recording
from emp_llm.calibration.sinks import Decisions, Scores
from emp_llm.calibration.statistics import Need, Statistics
from emp_llm.calibration.target_judge import Judge
from emp_llm.errors import OptionError
from emp_llm.options import counts_magnitudes
from emp_llm.selection.mask_store import MaskStore

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from emp_llm.calibration.sinks import Sink
    from emp_llm.calibration.statistics import Known
    from emp_llm.checkpoint.open_files import OpenFiles
    from emp_llm.options import PruneOptions
    from emp_llm.pruning.plan import PruningPlan
    from emp_llm.runtime.workers import Workers
    from emp_llm.tensors.target import Target

__all__ = ["Calibration", "calibrate"]

_REPAIR_NEEDS: dict[str, frozenset[Need]] = {
    "none": frozenset(),
    "obs": frozenset({"hessian"}),
    "bias": frozenset({"means"}),
}


def calibrate(plan: PruningPlan, workers: Workers, store: MaskStore) -> float:
    """Decide on all targets of a plan that the store does not know yet.

    Args:
        plan: What is to be pruned, and by which rule.
        workers: What reads and counts.
        store: Where decisions go.

    Returns:
        The β: the plan's, or the one that the scores have the target sparsity at.

    Raises:
        CheckpointError: If the source cannot be read or run, or has no tokenizer, or an activation,
            weight or score is not finite.
        OptionError: If the calibration's text is too short, or there is nothing to repair, or no β
            has that sparsity.
        OSError: If decisions or activations cannot be written.
    """
    needs = find_criterion(plan.options.criterion).needs | _REPAIR_NEEDS[plan.options.repair]
    with plan.source.files(plan.checkpoint.shards) as files, recording():
        session = None
        if needs:
            session = Session(plan, workers.progress, files, store.folder)
            store.note("calibration", session.samples.description())
        return Calibration(plan, workers, files, session).decide(store)


class Calibration:
    """The decisions by one rule.

    Args:
        plan: The targets, and the rule.
        workers: What reads and counts.
        files: The checkpoint's files.
        session: The model and its samples, where data is needed.
    """

    def __init__(
        self, plan: PruningPlan, workers: Workers, files: OpenFiles, session: Session | None
    ) -> None:
        self._workers = workers
        self._files = files
        self._options = options = plan.options
        self._session = session
        self._needs = find_criterion(options.criterion).needs
        self._repair_needs = _REPAIR_NEEDS[options.repair]
        self._units = session.targets if session else _by_block(plan)
        self._targets = [target for targets in self._units.values() for target in targets]
        if options.repair == "bias" and not any(map(self._bias, self._targets)):
            raise OptionError(
                "repair 'bias' changes the biases of pruned layers, and these have none: choose "
                "--repair obs"
            )

    def changed(self, store: MaskStore) -> Callable[[str, torch.Tensor], torch.Tensor]:
        """What loads the model as the decisions in a store leave it; for `Session.load`."""
        return self._decisions(store, self._options).changed

    def decide(self, store: MaskStore) -> float:
        """Decide on everything that a store does not know yet; returns β."""
        options = self._options
        seeks = options.target_sparsity is not None and not counts_magnitudes(options)
        together = seeks or options.granularity == "model"
        if not together and "gradient" not in self._needs:
            self._settle(self._decisions(store, options), self._needs | self._repair_needs)
            return options.beta
        if options.repair == "none":
            return self._decide_ahead(store, options, together=together)
        with MaskStore(store.folder / "masks") as masks:
            only_masks = replace(options, repair="none")
            beta = self._decide_ahead(masks, only_masks, together=together)
            self._settle(self._decisions(store, options, masks), self._repair_needs)
            for name, value in masks.notes.items():
                store.note(name, value)
        return beta

    def _decide_ahead(self, store: MaskStore, options: PruneOptions, *, together: bool) -> float:
        """Decide on all masks on the dense model; returns β."""
        if not together:
            self._settle(self._decisions(store, options), self._needs)
            return options.beta
        beta = store.notes.get("beta")
        if beta is None or not all(map(store.has, self._units)):
            scores = Scores(store.folder, self._judge(options), options.criterion)
            self._settle(scores, self._needs)
            beta = decide_together(
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

    def _judge(self, options: PruneOptions, given: MaskStore | None = None) -> Judge:
        device = self._session.device if self._session else torch.device("cpu")
        return Judge(options, self._files, device, given)

    def _decisions(
        self, store: MaskStore, options: PruneOptions, given: MaskStore | None = None
    ) -> Decisions:
        judge = self._judge(options, given)
        return Decisions(store, judge, self._units, self._bias_to_repair)

    def _settle(self, sink: Sink, needs: frozenset[Need]) -> None:
        """Have a sink settle on every part of the model, with what it needs to know."""
        if all(map(sink.has, self._units)):
            return
        if "gradient" in needs:
            self._go_back(sink)
        elif needs:
            self._go_forward(sink, needs)
        # what no sample comes to, or any data is needed for
        for unit in self._units:
            if not sink.has(unit):
                sink.settle(unit, self._units[unit], self._blank)

    def _go_forward(self, sink: Sink, needs: frozenset[Need]) -> None:
        """Settle on parts as samples come to them."""
        repairs = isinstance(sink, Decisions) and "hessian" in self._repair_needs & needs
        paired = repairs and self._data.options.sequential
        Forward(self._data, self._units, sink, needs, self._blank, paired=paired).run()

    def _go_back(self, sink: Sink) -> None:
        """Settle on parts as the gradients of the loss come back to them."""
        session = self._data
        session.begin("calibrating", 2)
        with session.walk(gradients=True) as walk:
            backward = Backward(session.model, walk.activations)
            for unit, calls in session.stops(walk):
                session.load(unit, unchanged)
                backward.record(walk, unit, calls, session.pass_block)
                session.model.release(unit)
            for unit, sums in backward.gradients(
                self._fed_by_targets, walk.own_forward, session.passed
            ):
                found = session.model.to_checkpoint(sums)
                session.model.release(unit)
                if unit in self._units and not sink.has(unit):
                    sink.settle(unit, self._units[unit], self._with_gradients(found))
                found.clear()
                sums.clear()

    def _with_gradients(self, gradients: Mapping[str, torch.Tensor]) -> Known:
        def found(target: Target, matrix: int) -> Statistics:
            geometry = target.geometry
            stored = gradients[target.name].reshape(geometry.matrices, *geometry.shape[-2:])[matrix]
            sums_RC = stored.T if geometry.transposed else stored
            ids_NL = self._data.samples.ids_NL
            tokens = ids_NL.numel() if sums_RC.any() else 0
            gradient_RC = sums_RC.contiguous() / (len(ids_NL) * self._data.gradient_scale)
            return replace(self._blank(target, matrix), tokens=tokens, gradient_RC=gradient_RC)

        return found

    def _fed_by_targets(self, unit: str) -> set[str]:
        """The parameters of a part, which is loaded, that its targets become."""
        targets = [target.name for target in self._units.get(unit, ())]
        return {name for name, _ in self._data.model.feeds(unit, targets).values()}

    def _bias(self, target: Target) -> str | None:
        """The biases of a target's layer, if it is one matrix with biases of its own."""
        return self._data.model.bias_of(target.name) if target.geometry.matrices == 1 else None

    def _bias_to_repair(self, target: Target) -> tuple[str, torch.Tensor] | None:
        name = self._bias(target) if self._options.repair == "bias" else None
        return None if name is None else (name, self._data.model.read(name))

    @property
    def _data(self) -> Session:
        assert self._session is not None  # noqa: S101 (opened where data is needed)
        return self._session

    def _blank(self, target: Target, matrix: int) -> Statistics:
        """All that is known of a matrix without data."""
        calibration = self._options.calibration
        return Statistics(
            tensor=target.name,
            matrix=matrix,
            first_row=matrix * target.geometry.matrix_rows,
            seed=calibration.seed if calibration else 0,
        )


def _by_block(plan: PruningPlan) -> dict[str, list[Target]]:
    """The targets of each block, by the checkpoint's names; outside blocks, one by one."""
    units: dict[str, list[Target]] = {}
    for target in plan.all_targets:
        unit = plan.decisions[target.name].block or target.name
        units.setdefault(unit, []).append(target)
    return units
