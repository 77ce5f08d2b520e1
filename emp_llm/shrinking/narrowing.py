"""Chooses neurons and groups of heads, and repairs what reads them, decoder block by decoder block.

All samples go through the model once. A decoder block's structures are chosen when the samples have
come to it, through the blocks before it as they have become; then its readers are fitted to the
outputs of the dense model, a quarter of the way, as weights are that pruning keeps.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from emp_kernels.numbers import FORMATS

from emp_llm.calibration.forward_walk import ForwardWalk
from emp_llm.calibration.session import Session, recording
from emp_llm.calibration.statistics import Statistics
from emp_llm.calibration.tensor_loading import unchanged
from emp_llm.errors import CheckpointError
from emp_llm.options import NO_TARGETS, PruneOptions
from emp_llm.pruning.plan import PruningPlan
from emp_llm.shrinking.column_sink import ColumnSink, Reader
from emp_llm.tensors.target import Target

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from emp_llm.calibration.statistics import Need
    from emp_llm.calibration.tensor_loading import Change
    from emp_llm.checkpoint.header import TensorEntry
    from emp_llm.checkpoint.open_files import OpenFiles
    from emp_llm.options import CalibrationOptions
    from emp_llm.runtime.progress import SharedProgress
    from emp_llm.selection.mask_store import MaskStore
    from emp_llm.shrink_options import ShrinkOptions
    from emp_llm.shrinking.choice import KindName
    from emp_llm.shrinking.plan import ShrinkPlan

__all__ = ["Narrowing", "find_readers", "narrowing"]


@contextmanager
def narrowing(
    plan: ShrinkPlan,
    kinds: Sequence[KindName],
    options: ShrinkOptions,
    progress: SharedProgress,
    folder: Path,
) -> Iterator[Narrowing]:
    """Open a checkpoint to choose some of its neurons or groups of heads.

    Args:
        plan: The checkpoint and its structures.
        kinds: What is to become fewer.
        options: How they are chosen.
        progress: Reports the walk through the model.
        folder: Where activations wait that exceed the memory for them.

    Raises:
        CheckpointError: If not exactly one matrix reads the structures of each holder; as
            `emp_llm.calibration.session.Session` does.
        OptionError: As there.
    """
    readers = find_readers(plan, kinds)
    with plan.source.files(plan.checkpoint.shards) as files, recording():
        session = None
        by_data = options.narrows_by_data or options.max_loss_increase is not None
        if by_data and options.calibration is not None:
            targets = [reader.target for reader in readers]
            session = _opened(plan, targets, options.calibration, progress, files, folder)
        yield Narrowing(readers, options, files, session)


class Narrowing:
    """Chooses structures of a checkpoint, any numbers of them, one after the other.

    Args:
        readers: What reads them.
        options: How they are chosen.
        files: The checkpoint's files.
        session: The model and its samples; None where no data is needed.

    Attributes:
        session: The model and its samples.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        options: ShrinkOptions,
        files: OpenFiles,
        session: Session | None,
    ) -> None:
        self.session = session
        self._readers = {reader.target.name: reader for reader in readers}
        self._options = options
        self._files = files
        self._units = session.targets if session else _by_holder(readers)

    def choose(self, keep: Mapping[KindName, int], store: MaskStore) -> ColumnSink:
        """Choose structures; what a store holds of the same numbers already is taken from there.

        Args:
            keep: How many of each kind stay in each holder.
            store: Takes choices and repaired weights, decoder block by decoder block.

        Returns:
            All choices, and what changes tensors of the source by them.

        Raises:
            CheckpointError: If the source cannot be read or run.
            OSError: If the store cannot be written.
        """
        options, session = self._options, self.session
        sink = ColumnSink(
            store,
            self._readers,
            self._units,
            self._files,
            torch.device("cpu") if session is None else session.device,
            keep=keep,
            score=options.width_score,
            repair=options.repair == "obs",
        )
        if options.narrows_by_data and session is not None and not all(map(sink.has, self._units)):
            paired = options.repair == "obs" and session.options.sequential
            needs: frozenset[Need] = frozenset({"hessian"})
            walk = ForwardWalk(session, self._units, sink, needs, self._without_data, paired=paired)
            walk.run()
        # where no data is needed; with data, units that no sample has come to are refused here
        for unit, targets in self._units.items():
            if not sink.has(unit):
                sink.process(unit, targets, self._without_data)
        return sink

    def loss(self, change: Change = unchanged) -> float:
        """The loss of the model, nats per token, with its tensors as something changes them.

        Raises:
            CheckpointError: If the model does not run or predicts no next token.
            ValueError: If there are no data.
        """
        if self.session is None:
            raise ValueError("there are no data to measure a loss on")
        self.session.begin("measuring the loss")
        return self.session.loss(change)

    def _without_data(self, target: Target, matrix: int) -> Statistics:
        data = self._options.calibration
        seed = data.seed if data is not None else 0
        return Statistics(tensor=target.name, matrix=matrix, seed=seed)


def find_readers(plan: ShrinkPlan, kinds: Sequence[KindName]) -> list[Reader]:
    """The matrices that read the structures of some kinds.

    Raises:
        CheckpointError: If not exactly one matrix reads those of each holder, or its dtype is one
            that emp-llm does not compute with.
    """
    found = list(_readers(plan, kinds))
    for kind in kinds:
        count = Counter(reader.holder for reader in found if reader.kind == kind)
        for holder in plan.structures[kind].holders:
            if count[holder] != 1:
                raise CheckpointError(
                    f"{holder}: {count[holder]} matrices have inputs for its {kind}, and emp-llm "
                    f"can choose {kind} only where one has: keep all of them"
                )
    return found


def _readers(plan: ShrinkPlan, kinds: Sequence[KindName]) -> Iterator[Reader]:
    for shard, entry, axis in plan.readers(kinds):
        _check_dtype(entry)
        yield Reader(
            target=Target.of(shard, entry, transposed=axis.dimension == 0),
            kind=axis.kind,
            holder=axis.holder,
            number=plan.structures[axis.kind].number,
        )


def _check_dtype(entry: TensorEntry) -> None:
    if entry.dtype not in FORMATS:
        raise CheckpointError(
            f"{entry.name!r} is {entry.dtype}, and emp-llm chooses what it reads where it is "
            f"{', '.join(FORMATS)}: give a checkpoint in one of these dtypes"
        )


def _by_holder(readers: Sequence[Reader]) -> dict[str, list[Target]]:
    units: dict[str, list[Target]] = {}
    for reader in readers:
        units.setdefault(reader.holder, []).append(reader.target)
    return units


def _opened(
    plan: ShrinkPlan,
    targets: Sequence[Target],
    calibration: CalibrationOptions,
    progress: SharedProgress,
    files: OpenFiles,
    folder: Path,
) -> Session:
    """The model, of which some tensors are to change, and its samples."""
    by_shard: dict[str, list[Target]] = {shard.name: [] for shard in plan.checkpoint.shards}
    for target in targets:
        by_shard[target.shard.name].append(target)
    pruning = PruningPlan(
        source=plan.source,
        checkpoint=plan.checkpoint,
        options=PruneOptions(targets=NO_TARGETS, output_format="dense", calibration=calibration),
        decisions={},
        missing=(),
        targets=by_shard,
    )
    return Session(pruning, progress, files, folder, torch.float32)
