"""A packed difference, opened for reading as its sum with the base."""

from typing import TYPE_CHECKING

from emp_kernels.numbers import FORMATS
from emp_kernels.rows import Patterns, Workspace

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.deltas.arithmetic import add
from emp_llm.errors import CheckpointError
from emp_llm.tensors.geometry import Geometry, RowBlock
from emp_llm.tensors.packed_reader import PackedReader
from emp_llm.tensors.row_reader import PlainReader, StoredRows, block_memory
from emp_llm.tensors.stored_tensors import PlainTensor
from emp_llm.tensors.whole_reader import WholeReader

if TYPE_CHECKING:
    import torch
    from emp_kernels.gpu_workspace import DeviceWorkspace

__all__ = ["SumReader", "with_base"]


class SumReader(PackedReader):
    """Reads one packed tensor and adds a base to it, in float32, rounded to its own dtype.

    Args:
        file: Its file.
        packed: The tensor, as it is stored.
        base: The base's tensor, of the same shape.

    Raises:
        CheckpointError: If the file cannot be read.
        FormatError: If the tensor is damaged.
    """

    def __init__(self, file: SourceFile, packed: PackedReader, base: PlainTensor) -> None:
        super().__init__(file, packed.planes, packed.packed)
        stored = packed.geometry
        geometry = Geometry(
            number_format=FORMATS[base.entry.dtype],
            shape=stored.shape,
            transposed=stored.transposed,
        )
        self._base = PlainReader(base.file, base.entry, geometry)

    def read(
        self, block: RowBlock, workspace: Workspace, memory: Patterns | None = None
    ) -> StoredRows:
        """Read a row block: the records that are stored, and the rows with the base added."""
        stored = super().read(block, workspace, memory)
        room = block_memory(self._base.geometry, block, workspace, "base")
        base = self._base.read(block, workspace, room).rows
        formats = self.geometry.number_format, self._base.geometry.number_format
        add(stored.rows, formats[0], base, formats[1])
        return stored

    def read_there(
        self, block: RowBlock, workspace: "DeviceWorkspace", out: "torch.Tensor"
    ) -> None:
        """Read a row block on the CPU, and copy it to a GPU."""
        from emp_kernels.numbers import tensor_of_patterns

        # the copy waits: the buffer that it is made from is used again
        out.copy_(tensor_of_patterns(self.read(block, workspace).rows))


def with_base(
    readers: dict[str, PackedReader | WholeReader],
    file: SourceFile,
    base: Checkpoint,
    base_files: OpenFiles,
) -> dict[str, PackedReader | WholeReader]:
    """The packed tensors of a delta's file as they are in the model: differences with their base.

    Args:
        readers: The packed tensors as they are stored, by name.
        file: Their file.
        base: The base.
        base_files: Its files.

    Raises:
        CheckpointError: If the base lacks a tensor, or has it in another shape.
    """
    summed: dict[str, PackedReader | WholeReader] = {}
    for name, reader in readers.items():
        summed[name] = reader
        if isinstance(reader, PackedReader):
            shard, entry = base.tensors.get(name, (None, None))
            shape = reader.geometry.shape
            if shard is None or entry is None or entry.shape != shape or entry.dtype not in FORMATS:
                raise CheckpointError(
                    f"{base.folder}: has no weights {name!r} of shape {list(shape)}, which the "
                    f"delta in {file.name} is added to: "
                    "give the base that it was made from"
                )
            summed[name] = SumReader(file, reader, PlainTensor(base_files.file(shard), entry))
    return summed
