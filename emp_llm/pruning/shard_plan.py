"""The plan of one new shard: its tensors, their order in the file, and the work on each.

Tensors whose bytes are a multiple of 16, as those of packed ones always are, come first, by name,
which mixes those that keep the processor busy with those that are copied. The few others follow,
those with wide items first. So every tensor starts at a multiple of its items' size, and the same
tensors always make the same file.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.dtypes import ITEM_BITS
from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.safetensors_header import ALIGNMENT
from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.checkpoint.weight_files import WEIGHTS_NAME
from emp_llm.options import OutputFormat, PruneOptions, packs_rest
from emp_llm.pruning.copy_job import CopyJob
from emp_llm.pruning.dense_job import DenseJob
from emp_llm.pruning.pack_job import PackJob
from emp_llm.pruning.rest_job import RestJob, rest_geometry
from emp_llm.pruning.shard_output import NewFile, WriteJob
from emp_llm.pruning.shard_writer import Entry, ShardWriter
from emp_llm.selection.selection import Selection
from emp_llm.tensors.geometry import WholeGeometry
from emp_llm.tensors.target import Target

__all__ = ["ShardPlan", "file_order", "output_name"]


def output_name(checkpoint: Checkpoint, shard: Shard) -> str:
    """The file name of a shard in the result.

    transformers finds `model.safetensors`, files that an index names and the one that the config
    names under ``transformers_weights``, but no single file of another name: that one is renamed.
    """
    if checkpoint.index_name is None and "transformers_weights" not in checkpoint.config:
        return WEIGHTS_NAME
    return shard.safetensors_name


def file_order(entry: TensorEntry, *, packed: bool = False) -> tuple[bool, int, str]:
    """The key that tensors of a file are sorted by.

    Args:
        entry: The tensor, as it is when it is not packed.
        packed: Whether it is packed in the file.
    """
    if packed or entry.nbytes % ALIGNMENT == 0:
        return False, 0, entry.name
    return True, -ITEM_BITS[entry.dtype], entry.name


@dataclass(frozen=True)
class ShardPlan:
    """A source shard and the new shard that it gives.

    Attributes:
        shard: The source.
        entries: Its tensors, in the order of the new file.
        targets: The entries that are pruned, by name.
        rest: How the rows of other entries run that are packed without being pruned, by name.
        output_format: Whether targets are packed or stay dense.
    """

    shard: Shard
    entries: tuple[TensorEntry, ...]
    targets: Mapping[str, Target]
    rest: Mapping[str, WholeGeometry]
    output_format: OutputFormat

    @classmethod
    def make(cls, shard: Shard, targets: Iterable[Target], options: PruneOptions) -> "ShardPlan":
        """Plan the new shard that a source shard gives.

        Args:
            shard: The source.
            targets: Its tensors that are pruned.
            options: Whether these, and others, are packed.
        """
        by_name = {target.name: target for target in targets}
        packed = by_name if options.output_format == "packed" else {}
        entries = sorted(
            shard.header.tensors, key=lambda entry: file_order(entry, packed=entry.name in packed)
        )
        rest = {
            entry.name: geometry
            for entry in entries
            if packs_rest(options)
            and entry.name not in by_name
            and (geometry := rest_geometry(entry)) is not None
        }
        return cls(shard, tuple(entries), by_name, rest, options.output_format)

    @property
    def rest_entries(self) -> Iterator[tuple[TensorEntry, WholeGeometry]]:
        """The entries that are packed without being pruned, and how their rows run."""
        for entry in self.entries:
            if entry.name in self.rest:
                yield entry, self.rest[entry.name]

    @property
    def rest_bytes(self) -> int:
        """Bytes of these in the source."""
        return sum(entry.nbytes for entry, _ in self.rest_entries)

    @property
    def in_order(self) -> bool:
        """Whether the new file will be written from its beginning to its end, roughly."""
        # rows of a transposed tensor are columns of the file
        transposed = any(target.geometry.transposed for target in self.targets.values())
        return self.output_format == "packed" or not transposed

    def entries_at_most(self) -> Iterator[Entry]:
        """The new header's entries, with sizes that the final ones do not exceed."""
        for entry in self.entries:
            if self.output_format == "packed" and entry.name in self.targets:
                yield from PackJob.entries_at_most(self.targets[entry.name])
            elif entry.name in self.rest:
                yield from RestJob.entries_at_most(entry)
            else:
                yield from CopyJob.entries(entry)

    def new_file(self, name: str, file: SourceFile, selection: Selection) -> NewFile:
        """The new file, with the jobs that write it.

        Args:
            name: Its name.
            file: The source's file.
            selection: What to keep of the targets.
        """
        return NewFile(
            name=name,
            entries_at_most=self.entries_at_most(),
            in_order=self.in_order,
            jobs=partial(self._jobs, file, selection),
        )

    def _jobs(
        self, file: SourceFile, selection: Selection, writer: ShardWriter
    ) -> Iterator[WriteJob]:
        prune_to = PackJob if self.output_format == "packed" else DenseJob
        for entry in self.entries:
            if entry.name in self.targets:
                yield prune_to(self.targets[entry.name], file, selection, writer)
                continue
            source = selection.copied_from(entry, file)
            if entry.name in self.rest:
                yield RestJob(entry, self.rest[entry.name], source, writer)
            else:
                yield CopyJob(entry, source, writer)
