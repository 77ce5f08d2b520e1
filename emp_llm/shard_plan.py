"""What becomes of one shard: which tensors the new file holds, in which order, and the work.

Packed tensors come first, for all of their planes end at multiples of 16 bytes. Plain ones follow
in the order of safetensors' own writer, wide items first, then by name: so every tensor starts at
a multiple of its items' size, and the same tensors always make the same file.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from emp_llm.checkpoint import WEIGHTS_NAME, Checkpoint, Shard
from emp_llm.options import OutputFormat
from emp_llm.prune_steps import CopyJob, DenseJob, PackJob, TargetJob
from emp_llm.safetensors_header import ITEM_BITS, TensorEntry
from emp_llm.selection import Selection
from emp_llm.shard_writer import Entry, ShardWriter
from emp_llm.target import Target

__all__ = ["ShardPlan", "output_name", "plain_order"]


def output_name(checkpoint: Checkpoint, shard: Shard) -> str:
    """The file name of a shard in the result: the source's, or one that transformers looks for.

    transformers looks for `model.safetensors`, for what an index names and for what the config
    names under ``transformers_weights``, not for a lone file of another name.
    """
    if checkpoint.index_name is None and "transformers_weights" not in checkpoint.config:
        return WEIGHTS_NAME
    return shard.name


def plain_order(entry: TensorEntry) -> tuple[int, str]:
    """The sorting key of plain tensors in a file."""
    return -ITEM_BITS[entry.dtype], entry.name


@dataclass(frozen=True)
class ShardPlan:
    """A source shard and what is to become of it.

    Attributes:
        shard: The source.
        packed: Targets that are packed, in order.
        plain: All other tensors, in order.
        dense: Those of them that get zeros, by name.
    """

    shard: Shard
    packed: tuple[Target, ...]
    plain: tuple[TensorEntry, ...]
    dense: Mapping[str, Target]

    @classmethod
    def make(
        cls, shard: Shard, targets: Iterable[Target], output_format: OutputFormat
    ) -> "ShardPlan":
        """Plan a shard whose targets these are."""
        by_name = {target.name: target for target in targets}
        packed = by_name if output_format == "packed" else {}
        plain = [entry for entry in shard.header.tensors if entry.name not in packed]
        return cls(
            shard,
            tuple(packed[name] for name in sorted(packed)),
            tuple(sorted(plain, key=plain_order)),
            {} if packed else by_name,
        )

    def entries_at_most(self) -> Iterator[Entry]:
        """The new header's entries, with sizes that the ones to come cannot exceed."""
        for target in self.packed:
            yield from PackJob.entries_at_most(target)
        for entry in self.plain:
            yield from CopyJob.entries(entry)

    def jobs(
        self, fd: int, selection: Selection, writer: ShardWriter
    ) -> Iterator[TargetJob | CopyJob]:
        """The work, in order.

        Args:
            fd: The source, open for reading.
            selection: What to keep of the targets.
            writer: The new file.
        """
        for target in self.packed:
            yield PackJob(target, fd, selection, writer)
        for entry in self.plain:
            if entry.name in self.dense:
                yield DenseJob(self.dense[entry.name], fd, selection, writer)
            else:
                yield CopyJob(entry, fd, self.shard.name, writer)
