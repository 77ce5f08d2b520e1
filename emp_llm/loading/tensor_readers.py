"""Whole tensors of a checkpoint, read from its files row block by row block: pruned, or unpacked.

The CPU does the work, or the GPU that a tensor is to be on. A GPU gets rows that are packed or not
yet pruned, one row block at a time, so its memory holds little more than the tensor itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from emp_kernels.dispatch import prune_rows
from emp_kernels.errors import DamagedRowError, NonFiniteRowError
from emp_kernels.gpu_workspace import DeviceWorkspace
from emp_kernels.numbers import tensor_of_patterns, torch_integers
from emp_kernels.rows import Patterns, Workspace

from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.resident.dense_weights import DenseWeights
from emp_llm.resident.held_planes import HeldPlanes
from emp_llm.selection.selection import Selection
from emp_llm.tensors.geometry import Geometry, RowBlock
from emp_llm.tensors.packed_reader import PackedReader
from emp_llm.tensors.target import Target
from emp_llm.tensors.whole_reader import WholeReader

__all__ = [
    "DeviceWeights",
    "PruningReader",
    "TargetReader",
    "TensorReader",
    "UnpackingReader",
]


class DeviceWeights:
    """A dense tensor on a GPU with arbitrary values, to be filled row block by row block.

    Args:
        geometry: How its rows run.
        device: The GPU.

    Attributes:
        tensor: The tensor.
    """

    def __init__(self, geometry: Geometry, device: torch.device) -> None:
        dtype = geometry.number_format.torch_dtype
        self.tensor = torch.empty(geometry.shape, dtype=dtype, device=device)
        if device.type == "cuda":
            # The memory may have been freed while kernels on this stream still read from it, and it
            # is written on the streams of workspaces.
            torch.cuda.current_stream(device).synchronize()
        self._transposed = geometry.transposed
        bits = self.tensor.view(torch_integers(geometry.number_format.item_bytes))
        self._matrices = bits.view(geometry.matrices, -1, geometry.shape[-1])

    def rows(self, block: RowBlock) -> torch.Tensor:
        """A view of a row block, int16 or int32 [rows, columns], of any strides."""
        matrix = self._matrices[block.matrix]
        return (matrix.T if self._transposed else matrix)[block.start : block.stop]

    def place(self, block: RowBlock, rows: Patterns, workspace: DeviceWorkspace) -> None:
        """Write a row block.

        Args:
            block: Which rows.
            rows: [rows, columns]; do not change it before ``workspace.wait()`` has returned.
            workspace: A workspace of the GPU; its stream does the copy.
        """
        with workspace.active():
            self.rows(block).copy_(tensor_of_patterns(rows), non_blocking=True)


class TensorReader(ABC):
    """Reads a tensor of a checkpoint, changed on the way.

    Attributes:
        geometry: How its rows run.
    """

    geometry: Geometry

    def row_blocks(self) -> Sequence[RowBlock]:
        """The row blocks that it is read in."""
        return list(self.geometry.row_blocks())

    @abstractmethod
    def fill(self, weights: DenseWeights, block: RowBlock, workspace: Workspace) -> None:
        """Read one row block; on any thread.

        Args:
            weights: The tensor that is filled.
            block: Which rows.
            workspace: Buffers of this thread.
        """

    @abstractmethod
    def fill_there(
        self, weights: DeviceWeights, block: RowBlock, workspace: DeviceWorkspace
    ) -> None:
        """Read one row block to a GPU, as `fill` does; the copy is complete on return.

        Args:
            weights: The tensor that is filled.
            block: Which rows.
            workspace: Buffers of this thread, for the GPU.
        """


class TargetReader(TensorReader):
    """Reads a target and sets the weights that do not stay to +0.0.

    Args:
        target: The tensor.
        file: Its file.
    """

    def __init__(self, target: Target, file: SourceFile) -> None:
        self.geometry = target.geometry
        self._target = target
        self._file = file

    def fill(self, weights: DenseWeights, block: RowBlock, workspace: Workspace) -> None:
        """Read and prune one row block.

        Raises:
            CheckpointError: If it cannot be read, or holds NaN or infinity.
        """
        memory = weights.in_place(block)
        rows = self._target.read(self._file, block, workspace, memory)
        self._prune(rows, block, workspace)
        if memory is None:
            weights.place(block, rows)

    def fill_there(
        self, weights: DeviceWeights, block: RowBlock, workspace: DeviceWorkspace
    ) -> None:
        """Read one row block, prune it on the CPU and copy it to the GPU.

        Raises:
            CheckpointError: As `fill`.
        """
        rows = self._target.read(self._file, block, workspace)
        self._prune(rows, block, workspace)
        weights.place(block, rows, workspace)
        workspace.wait()

    @abstractmethod
    def _prune(self, rows: Patterns, block: RowBlock, workspace: Workspace) -> None:
        """Set the weights of a row block that do not stay to +0.0."""


class PruningReader(TargetReader):
    """Reads a target and prunes it by EMP's rule.

    Args:
        target: The tensor.
        file: Its file.
        selection: What to keep.
    """

    def __init__(self, target: Target, file: SourceFile, selection: Selection) -> None:
        super().__init__(target, file)
        self._selection = selection

    def fill_there(
        self, weights: DeviceWeights, block: RowBlock, workspace: DeviceWorkspace
    ) -> None:
        """Read one row block, copy it to the GPU and prune it there.

        Raises:
            CheckpointError: As `fill`.
        """
        from emp_kernels.gpu_tensors import prune_there

        rows = self._target.read(self._file, block, workspace)
        rule = self._selection.rule(self._target, block)
        there, number_format = weights.rows(block), self.geometry.number_format
        try:
            with workspace.active():
                weights.place(block, rows, workspace)
                prune_there(there, number_format, rule, workspace=workspace)
        except NonFiniteRowError as error:
            raise self._target.not_finite(block, error) from error

    def _prune(self, rows: Patterns, block: RowBlock, workspace: Workspace) -> None:
        rule = self._selection.rule(self._target, block)
        try:
            prune_rows(rows, self.geometry.number_format, rule, out=rows, workspace=workspace)
        except NonFiniteRowError as error:
            raise self._target.not_finite(block, error) from error


class UnpackingReader(TensorReader):
    """Reads a packed tensor and unpacks it.

    Args:
        reader: Reads its records.

    Attributes:
        packed_bytes: Bytes of its planes.
    """

    def __init__(self, reader: PackedReader | WholeReader) -> None:
        self.geometry = reader.geometry
        self.packed_bytes = reader.nbytes
        self._reader = reader

    def hold(self) -> HeldPlanes:
        """Read the planes as they are; each record is checked.

        Raises:
            CheckpointError: If they cannot be read.
            FormatError: If they are damaged.
        """
        reader = self._reader
        buffer = torch.empty(reader.nbytes, dtype=torch.uint8)
        reader.read_planes(buffer.numpy())
        planes = HeldPlanes(buffer, reader.encode_meta())
        try:
            _ = planes.held
        except DamagedRowError as error:
            what = "record" if planes.is_whole else "row"
            raise reader.damage(f"{what} {error.row}: {error.fault}") from error
        return planes

    def fill(self, weights: DenseWeights, block: RowBlock, workspace: Workspace) -> None:
        """Read and unpack one row block.

        Raises:
            CheckpointError: If it cannot be read.
            FormatError: If it is damaged.
        """
        memory = weights.in_place(block)
        rows = self._reader.read(block, workspace, memory).rows
        if memory is None:
            weights.place(block, rows)

    def fill_there(
        self, weights: DeviceWeights, block: RowBlock, workspace: DeviceWorkspace
    ) -> None:
        """Read the records of one row block, and unpack them on the GPU.

        Raises:
            CheckpointError: As `fill`.
            FormatError: As `fill`.
        """
        self._reader.read_there(block, workspace, weights.rows(block))
