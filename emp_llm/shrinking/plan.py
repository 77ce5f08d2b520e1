"""What shrinking a checkpoint does: its structures, those that stay, and the cut of each tensor.

ShrinkPlan    the checkpoint and its structures
Shrinkage     with choices made: the new config, and what is kept of each tensor
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.dtypes import ITEM_BITS
from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.shard import Shard
from emp_llm.errors import CheckpointError
from emp_llm.hub.source import Source
from emp_llm.pruning.shard_plan import file_order
from emp_llm.report.file_names import SHRINK_FIGURE_NAME, SHRINK_REPORT_NAME
from emp_llm.shrinking.axes import Axis
from emp_llm.shrinking.choice import Choice, KindName, Structures
from emp_llm.shrinking.cuts import Cut, cut_tensor
from emp_llm.shrinking.structures_process import Found, find_structures, fit_config

__all__ = ["ShrinkPlan", "Shrinkage", "open_source"]

_BYTE = 8
"""Bits."""


def open_source(source: Source) -> Checkpoint:
    """Open the checkpoint to shrink, without what an earlier shrinking has said of it.

    Raises:
        CheckpointError: As `emp_llm.checkpoint.checkpoint.open_checkpoint` does.
    """
    checkpoint = source.open_checkpoint()
    older = (SHRINK_REPORT_NAME, SHRINK_FIGURE_NAME)
    beside = checkpoint.beside
    travelling = {name: size for name, size in beside.travelling.items() if name not in older}
    return replace(checkpoint, beside=replace(beside, travelling=travelling))


@dataclass(frozen=True, kw_only=True)
class ShrinkPlan:
    """A checkpoint and its structures.

    Attributes:
        source: Where the checkpoint lies.
        checkpoint: What it holds. If two tied tensors are the same bytes of a file, it holds only
            the one that the other is tied to.
        found: Its structures of the kinds that were asked for, and how tensors depend on them.
    """

    source: Source
    checkpoint: Checkpoint
    found: Found

    @classmethod
    def make(
        cls,
        source: Source,
        checkpoint: Checkpoint,
        kinds: Sequence[KindName],
        *,
        refusing: bool = True,
    ) -> "ShrinkPlan":
        """Find the structures of some kinds.

        Args:
            source: Where the checkpoint lies.
            checkpoint: All that it holds.
            kinds: What is to become fewer.
            refusing: As for `emp_llm.shrinking.structures_process.find_structures`.

        Raises:
            CheckpointError: If the model has none of a kind, or emp-llm does not know how it is
                made of them.
        """
        found = find_structures(
            checkpoint.folder,
            {name: (entry.dtype, entry.shape) for name, (_, entry) in checkpoint.tensors.items()},
            checkpoint.config,
            kinds,
            absent=checkpoint.absent,
            where=source.repo_id or str(checkpoint.folder),
            refusing=refusing,
        )
        checkpoint = checkpoint.without(checkpoint.stored_twice(found.tied))
        return cls(source=source, checkpoint=checkpoint, found=found)

    @property
    def structures(self) -> Mapping[KindName, Structures]:
        """The structures of each kind that was asked for."""
        return self.found.structures

    def readers(self, kinds: Sequence[KindName]) -> Iterator[tuple[Shard, TensorEntry, Axis]]:
        """The matrices whose inputs are the outputs of some structures, with their axis for these.

        Args:
            kinds: Kinds of structures.
        """
        matrices, transposed = set(self.found.matrices), set(self.found.transposed)
        for shard in self.checkpoint.shards:
            for entry in shard.header.tensors:
                if entry.name in matrices:
                    inputs = 0 if entry.name in transposed else 1
                    for axis in self.found.axes.get(entry.name, ()):
                        if axis.kind in kinds and axis.dimension == inputs:
                            yield shard, entry, axis

    def with_choices(self, choices: Sequence[Choice]) -> "Shrinkage":
        """What is to be written, now that it is known which structures stay.

        The result is checked here: that its tensors are those that a model of the new config is
        loaded from. So nothing is ever written that would not load.

        Args:
            choices: One for each kind that was asked for.

        Raises:
            CheckpointError: If emp-llm does not know how to make the smaller model.
        """
        by_kind = {choice.kind: choice for choice in choices}
        cuts = {shard.name: self._cuts(shard, by_kind) for shard in self.checkpoint.shards}
        new = [cut.new_entry for shard_cuts in cuts.values() for cut in shard_cuts]
        config = fit_config(
            self.checkpoint.folder,
            {entry.name: (entry.dtype, entry.shape) for entry in new},
            self.checkpoint.config,
            choices,
            missing=self.found.missing,
            where=self.source.repo_id or str(self.checkpoint.folder),
        )
        return Shrinkage(plan=self, choices=by_kind, config=config, cuts=cuts)

    def _cuts(self, shard: Shard, choices: Mapping[KindName, Choice]) -> tuple[Cut, ...]:
        """What is kept of a shard's tensors, in the order of the new file."""
        outside = set(self.found.outside)
        cuts = [
            cut_tensor(entry, self.found.axes.get(entry.name, ()), choices)
            for entry in shard.header.tensors
            if entry.name not in outside
        ]
        found = [cut for cut in cuts if cut is not None]
        for cut in found:
            if cut.kept and ITEM_BITS[cut.entry.dtype] % _BYTE:
                raise CheckpointError(
                    f"{cut.entry.name!r} is {cut.entry.dtype}, several items to a byte, and cannot "
                    "be cut: load a dequantized checkpoint"
                )
        return tuple(sorted(found, key=lambda cut: file_order(cut.new_entry)))


@dataclass(frozen=True, kw_only=True)
class Shrinkage:
    """What is written of a checkpoint.

    Attributes:
        plan: The checkpoint and its structures.
        choices: Which of them stay, by kind.
        config: The content of the new config.json.
        cuts: What is kept of the tensors of each shard, by the shard's name, in the order of the
            new file; tensors that the model has no place for are left out.
    """

    plan: ShrinkPlan
    choices: Mapping[KindName, Choice]
    config: Mapping[str, Any]
    cuts: Mapping[str, Sequence[Cut]]

    @property
    def shards(self) -> list[Shard]:
        """The shards of the source of which something stays."""
        return [shard for shard in self.plan.checkpoint.shards if self.cuts[shard.name]]

    @property
    def all_cuts(self) -> Iterator[Cut]:
        """What is kept of all tensors, shard by shard."""
        for shard in self.shards:
            yield from self.cuts[shard.name]

    @property
    def written(self) -> Checkpoint:
        """The source without the shards of which nothing stays."""
        return replace(self.plan.checkpoint, shards=tuple(self.shards))
