"""A packed tensor that is not pruned, opened for reading: its records decoded by row blocks."""

import threading
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from emp_kernels.dispatch import unpack_whole
from emp_kernels.errors import DamagedRowError
from emp_kernels.rows import Bytes, Patterns, Workspace

from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.tensors.geometry import RowBlock, WholeGeometry
from emp_llm.tensors.planes import Planes
from emp_llm.tensors.planes_reader import PlanesReader
from emp_llm.tensors.row_reader import StoredRows, block_memory
from emp_llm.tensors.whole import WholeTensor

if TYPE_CHECKING:
    import torch
    from emp_kernels.gpu_workspace import DeviceWorkspace

__all__ = ["UnpackedBytes", "WholeReader"]

_TABLE_RECORDS = 1 << 18  # lengths that are read at a time


class WholeReader(PlanesReader):
    """Reads one packed tensor of which all weights are kept.

    Args:
        file: Its file.
        planes: Where its planes lie.
        whole: What `NAME.emp_meta` says of the tensor.

    Attributes:
        kept: How many weights it has: all are kept.

    Raises:
        CheckpointError: If the file cannot be read.
        FormatError: If the planes contradict each other.
    """

    def __init__(self, file: SourceFile, planes: Planes, whole: WholeTensor) -> None:
        self.whole = whole
        super().__init__(file, planes, whole.table_bytes, whole.geometry.records * whole.line_bytes)
        self.kept = whole.geometry.rows * whole.geometry.columns

    @property
    def geometry(self) -> WholeGeometry:
        """The shape of the dense tensor, and how its rows run."""
        return self.whole.geometry

    def encode_meta(self) -> bytes:
        """The bytes of its parameters."""
        return self.whole.encode_meta()

    def kept_rows(self, block: RowBlock) -> npt.NDArray[np.int64]:
        """How many weights each row of a row block keeps, int64 [rows]: all."""
        return np.full(block.stop - block.start, self.geometry.columns, np.int64)

    def read(
        self, block: RowBlock, workspace: Workspace, memory: Patterns | None = None
    ) -> StoredRows:
        """Read and unpack a row block, one of the geometry's; see `RowReader`.

        Raises:
            CheckpointError: If it cannot be read.
            FormatError: If a record contradicts itself or its length.
        """
        records = self.stored_block(block, workspace)
        out = block_memory(self.geometry, block, workspace) if memory is None else memory
        numbers = self.geometry.block_records(block)
        lengths = self._lengths(numbers.start, numbers.stop)
        try:
            unpack_whole(records, lengths, self.whole.layout, out, workspace=workspace)
        except DamagedRowError as error:
            raise self.damage(f"record {numbers.start + error.row}: {error.fault}") from error
        return StoredRows(records, out)

    def read_there(
        self, block: RowBlock, workspace: "DeviceWorkspace", out: "torch.Tensor"
    ) -> None:
        """Read a row block, unpack it on the CPU and copy it to a GPU.

        Args:
            block: Which rows.
            workspace: The GPU's workspace.
            out: int16 or int32 [rows, columns] on the GPU, of any strides; written.

        Raises:
            CheckpointError: If it cannot be read.
            FormatError: If a record contradicts itself or its length.
        """
        from emp_kernels.numbers import tensor_of_patterns

        # the copy waits: the buffer that it is made from is used again
        out.copy_(tensor_of_patterns(self.read(block, workspace).rows))

    def _find_starts(self) -> list[int]:
        """Check the lengths; returns where the records of each row block start, and they end."""
        geometry, longest = self.geometry, self.whole.layout.longest_record
        firsts = np.array([geometry.block_records(b).start for b in geometry.row_blocks()])
        end, starts = 0, []
        for first in range(0, geometry.records, _TABLE_RECORDS):
            stop = min(first + _TABLE_RECORDS, geometry.records)
            lengths = self._lengths(first, stop)
            if lengths.max() > longest:
                record = first + int(lengths.argmax())
                raise self.damage(f"record {record}: its length, {lengths.max()}, is impossible")
            offsets = end + np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
            here = firsts[(firsts >= first) & (firsts < stop)]
            starts.extend(offsets[here - first].tolist())
            end = int(offsets[-1])
        return [*starts, end]

    def _lengths(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """Bytes of some records, int64 [stop - first]."""
        return self.whole.decode_table(self.table_lines(first, stop, self.whole.line_bytes))


class UnpackedBytes(SourceFile):
    """The bytes of the dense tensor, unpacked as they are read; for readers of other row blocks.

    Args:
        reader: The packed tensor.
    """

    def __init__(self, reader: WholeReader) -> None:
        self.name = reader.name
        self._reader = reader
        self._blocks = list(reader.geometry.row_blocks())
        self._block_bytes = reader.geometry.block_bytes(self._blocks[0])
        self._workspace = Workspace()
        self._lock = threading.Lock()
        self._unpacked: tuple[int, Bytes] | None = None  # the number of a row block, and its bytes

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the tensor's bytes from `offset` on; on any thread.

        Raises:
            CheckpointError: If the file cannot be read.
            FormatError: If a record contradicts itself or its length.
        """
        filled = 0
        with self._lock:
            while filled < len(buffer):
                number, skipped = divmod(offset + filled, self._block_bytes)
                part = self._block(number)[skipped : skipped + len(buffer) - filled]
                buffer[filled : filled + part.size] = part.data
                filled += part.size

    def _block(self, number: int) -> Bytes:
        """The bytes of a row block; the last one that was read is kept."""
        if self._unpacked is None or self._unpacked[0] != number:
            rows = self._reader.read(self._blocks[number], self._workspace).rows
            self._unpacked = number, rows.reshape(-1).view(np.uint8)
        return self._unpacked[1]

    def close(self) -> None:
        """Nothing: the packed tensor's file is not closed by this."""
