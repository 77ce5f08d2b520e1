"""The tensors of a checkpoint, packed or plain: listed from headers, opened to be read."""

from dataclasses import dataclass

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.tensors.packed_reader import PackedReader, open_packed
from emp_llm.tensors.planes import Planes, find_packed
from emp_llm.tensors.whole_reader import WholeReader

__all__ = ["OpenTensor", "PlainTensor", "StoredTensor", "stored_tensors"]


@dataclass(frozen=True)
class PlainTensor:
    """A tensor that is not packed, and the open file that holds it."""

    file: SourceFile
    entry: TensorEntry


OpenTensor = PlainTensor | PackedReader | WholeReader
"""A tensor that is open for reading."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint.

    Attributes:
        name: Its name.
        shard: The shard that holds it.
        place: Where it lies there; where the planes lie if it is packed.
    """

    name: str
    shard: Shard
    place: TensorEntry | Planes

    @property
    def nbytes(self) -> int:
        """Bytes that are stored of it."""
        return self.place.nbytes

    def open(self, files: OpenFiles) -> OpenTensor:
        """Open it, after waiting for its shard if that is still being downloaded.

        Raises:
            CheckpointError: If its file cannot be read.
            FormatError: If it is packed and damaged.
        """
        file = files.file(self.shard)
        if isinstance(self.place, Planes):
            return open_packed(file, self.place)
        return PlainTensor(file, self.place)


def stored_tensors(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint by name, in the order of the data.

    Raises:
        FormatError: If a plane of a packed one is missing.
    """
    found = {}
    for shard in checkpoint.shards:
        packed, plain = find_packed(shard.name, shard.header.tensors)
        for name, planes in packed.items():
            found[name] = StoredTensor(name, shard, planes)
        for entry in plain:
            found[entry.name] = StoredTensor(entry.name, shard, entry)
    return found
