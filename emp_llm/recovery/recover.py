"""Recovery, step by step: masks and repair → the whole model → training → new weights, stored.

The weights that pruning and repair left are trained for a few steps, so that the model predicts
what the dense one does: knowledge distillation under fixed masks. PERP (Zimmer et al., arXiv
2312.15230) shows how little of that is needed. Masks and repaired weights wait in a store of their
own; then the same masks, with the weights that were trained, go to the one that is written from.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from emp_kernels.numbers import patterns_of_tensor

from emp_llm.calibration.calibrate import Calibration, calibrate
from emp_llm.calibration.session import Session, recording
from emp_llm.checkpoint.dtypes import TORCH_NAMES
from emp_llm.recovery.memory import check_memory, training_dtype
from emp_llm.recovery.saved_state import SavedState
from emp_llm.recovery.trained_model import TrainedModel
from emp_llm.recovery.training import SAMPLES_PER_STEP, train
from emp_llm.selection.mask_store import MaskStore

if TYPE_CHECKING:
    from emp_llm.options import CalibrationOptions
    from emp_llm.pruning.plan import PruningPlan
    from emp_llm.runtime.workers import Workers
    from emp_llm.selection.mask_writer import MaskWriter
    from emp_llm.tensors.target import Target

__all__ = ["recover"]

_PRUNED = "pruned"
_VECTORS = "norms and biases"
_WRITTEN = "recovered"
"""Notes which units were written; last of all, so that with it a run has finished this step."""


def recover(plan: PruningPlan, workers: Workers, store: MaskStore) -> float:
    """Make the masks of all targets, and the weights that recovery gives.

    Args:
        plan: The targets, and the rule.
        workers: The threads and devices that read and count, and their progress.
        store: Takes masks, trained weights, norms and biases.

    Returns:
        β: the plan's, or the one at which the scores have the target sparsity.

    Raises:
        CheckpointError: As `emp_llm.calibration.calibrate.calibrate` does, or if the model predicts
            no next token.
        OptionError: As there, or if the model and what its training needs do not fit in memory.
        OSError: If masks, weights or the state of the training cannot be written.
    """
    written = store.notes.get(_WRITTEN, ())
    done = bool(written) and all(map(store.has, written))
    with MaskStore(store.folder / _PRUNED) as pruned:
        if not done:
            check_memory(plan, _data(plan))
        beta = calibrate(plan, workers, pruned)
        for name, value in pruned.notes.items():
            store.note(name, value)
        if not done:
            _train(plan, workers, pruned, store)
    return beta


def _train(plan: PruningPlan, workers: Workers, pruned: MaskStore, store: MaskStore) -> None:
    """Train what is pruned, and store the result."""
    state, data = SavedState(store.folder), _data(plan)
    drawn = _with_samples(plan, data)
    with plan.source.files(plan.checkpoint.shards) as files, recording():
        dtype = training_dtype(plan.checkpoint)
        session = Session(drawn, workers.progress, files, store.folder, dtype)
        changed = Calibration(plan, workers, files, session).changed(pruned)
        targets = [target.name for target in plan.all_targets]
        model = TrainedModel(session, targets, changed)
        train(session, model, plan.options.recover, state, workers.progress)
        for unit, some in session.targets.items():
            with store.writer(unit) as writer:
                tensors = model.targets(unit, [target.name for target in some])
                for target in some:
                    _add(writer, pruned, target, tensors[target.name])
        with store.writer(_VECTORS) as writer:
            for name in sorted(model.vectors):
                _replace(writer, model, name, plan.checkpoint.tensors[name][1].dtype)
        if "calibration" not in store.notes:  # these are the only samples
            store.note("calibration", {**session.samples.description(), "seed": data.seed})
    store.note(_WRITTEN, [*session.targets, _VECTORS])
    state.remove()


def _data(plan: PruningPlan) -> CalibrationOptions:
    if plan.options.calibration is None:
        raise ValueError("recovery needs a text")
    return plan.options.calibration


def _with_samples(plan: PruningPlan, data: CalibrationOptions) -> PruningPlan:
    """The plan with the samples of the training: others than those of the calibration."""
    drawn = replace(data, samples=plan.options.recover * SAMPLES_PER_STEP, seed=data.seed + 1)
    return replace(plan, options=replace(plan.options, calibration=drawn))


def _add(writer: MaskWriter, pruned: MaskStore, target: Target, values: torch.Tensor) -> None:
    """Store the masks of a target, and its trained weights."""
    geometry, name = target.geometry, target.name
    stored = values.to("cpu", geometry.number_format.torch_dtype)
    for matrix, stored_RC in enumerate(stored.reshape(-1, *stored.shape[-2:])):
        weights_RC = stored_RC.T.contiguous() if geometry.transposed else stored_RC
        first = matrix * len(weights_RC)
        stop = first + len(weights_RC)
        writer.add(
            name,
            pruned.read_mask(name, first, stop),
            pruned.stats(name, first, stop),
            pruned.groups(name)[matrix : matrix + 1],
            patterns_of_tensor(weights_RC),
        )


def _replace(writer: MaskWriter, model: TrainedModel, name: str, dtype: str) -> None:
    """Store a norm or bias, unless it rounds to what it was."""
    trained, dense = (
        values.to("cpu", getattr(torch, TORCH_NAMES[dtype])) for values in model.vector(name)
    )
    if not torch.equal(trained, dense):
        writer.replace(name, trained.view(torch.uint8).numpy().tobytes())
