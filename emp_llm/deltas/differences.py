"""A checkpoint whose targets are read as differences to those of a base.

All that reads the checkpoint afterwards gets differences where it would have got weights: what is
kept of them, histograms, packed records and statistics are those of differences.
"""

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np
from emp_kernels.numbers import FORMATS

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.header import Header, TensorEntry
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.deltas.arithmetic import subtract
from emp_llm.tensors.stored_tensors import PlainTensor

__all__ = ["difference_to"]


def difference_to(checkpoint: Checkpoint, base: Checkpoint, names: Collection[str]) -> Checkpoint:
    """The checkpoint with some of its tensors read as differences to a base.

    Args:
        checkpoint: The fine-tuned model.
        base: The base; it has these tensors, each of the same shape and of a dtype that is pruned.
        names: Names of the tensors.
    """
    return replace(
        checkpoint,
        shards=tuple(
            _DifferenceShard(
                shard.name,
                shard.path,
                shard.header,
                shard.parts,
                stored=shard,
                subtracted={
                    entry.name: base.tensors[entry.name]
                    for entry in shard.header.tensors
                    if entry.name in names
                },
            )
            for shard in checkpoint.shards
        ),
    )


@dataclass(frozen=True)
class _DifferenceShard(Shard):
    """A shard with some tensors read as differences.

    Attributes:
        stored: The shard as it is.
        subtracted: By name, what is subtracted from a tensor: the base's shard and the tensor
            there.
    """

    stored: Shard = field(kw_only=True)
    subtracted: Mapping[str, tuple[Shard, TensorEntry]] = field(kw_only=True)

    @property
    def safetensors_name(self) -> str:
        """As of the shard as it is."""
        return self.stored.safetensors_name

    def read_header(self) -> Header:
        """As of the shard as it is."""
        return self.stored.read_header()

    def open(self) -> SourceFile:
        """Open it and the base's shards that it needs."""
        with ExitStack() as opened:
            base_files = opened.enter_context(OpenFiles())
            differences = [
                (entry, PlainTensor(base_files.file(shard), base_entry))
                for entry in self.stored.header.tensors
                if entry.name in self.subtracted
                for shard, base_entry in [self.subtracted[entry.name]]
            ]
            file = self.stored.open()
            opened.callback(file.close)
            return _DifferenceFile(file, differences, opened.pop_all())


class _DifferenceFile(SourceFile):
    """The file of a shard with some tensors read as differences.

    Args:
        file: The file as it is.
        differences: Tensors of it in the order of their data, each with what is subtracted.
        opened: Closes all files.
    """

    def __init__(
        self,
        file: SourceFile,
        differences: Sequence[tuple[TensorEntry, PlainTensor]],
        opened: ExitStack,
    ) -> None:
        self.name = file.name
        self._file = file
        self._differences = differences
        self._starts = [entry.start for entry, _ in differences]
        self._opened = opened

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from an offset on: some whole items of one tensor.

        Raises:
            CheckpointError: If this file or the base's cannot be read.
        """
        self._file.read_into(offset, buffer)
        number = bisect_right(self._starts, offset) - 1
        if number < 0 or offset >= self._differences[number][0].end:
            return
        entry, base = self._differences[number]
        number_format, base_format = FORMATS[entry.dtype], FORMATS[base.entry.dtype]
        weights = np.frombuffer(buffer, number_format.storage)
        others = np.empty(weights.size, base_format.storage)
        first = (offset - entry.start) // number_format.item_bytes
        at = base.entry.start + first * base_format.item_bytes
        base.file.read_into(at, others.view(np.uint8).data)
        subtract(weights, number_format, others, base_format)

    def close(self) -> None:
        """Close it and the base's."""
        self._opened.close()
