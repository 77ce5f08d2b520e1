"""A target: where the tensor lies, how its rows run, and the layout they are packed in."""

from collections.abc import Callable
from dataclasses import dataclass, field

from emp_kernels.errors import NonFiniteRowError
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import FORMATS
from emp_kernels.rows import Patterns, Workspace

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.errors import CheckpointError
from emp_llm.runtime.once import Once
from emp_llm.tensors.geometry import Geometry, RowBlock
from emp_llm.tensors.row_reader import PlainReader

__all__ = ["Target"]


@dataclass(frozen=True, eq=False)
class Target:
    """A tensor of the source that is pruned.

    Attributes:
        shard: The shard that holds it.
        entry: Its name, dtype, shape and place in the shard.
        geometry: How its rows run.
    """

    shard: Shard
    entry: TensorEntry
    geometry: Geometry
    _layout: Once[RowLayout] = field(default_factory=Once, init=False, repr=False)

    @classmethod
    def of(cls, shard: Shard, entry: TensorEntry, *, transposed: bool) -> "Target":
        """A tensor of a shard as a target.

        Args:
            shard: The shard.
            entry: The tensor; its dtype is one that can be pruned.
            transposed: Whether it lies [.., in, out] rather than [.., out, in].

        Raises:
            CheckpointError: If it is larger than a tensor of any model.
        """
        try:
            geometry = Geometry(
                number_format=FORMATS[entry.dtype], shape=entry.shape, transposed=transposed
            )
        except CheckpointError as error:
            raise CheckpointError(f"{shard.name}: {entry.name!r}: {error}") from error
        return cls(shard, entry, geometry)

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.entry.name

    def read(
        self,
        file: SourceFile,
        block: RowBlock,
        workspace: Workspace,
        memory: Patterns | None = None,
    ) -> Patterns:
        """Read the bit patterns of a row block, uint16 or uint32 [rows, columns].

        Args:
            file: The shard's file.
            block: Which rows.
            workspace: Buffers to use again.
            memory: Where to put them, C-contiguous; in the workspace if None.

        Raises:
            CheckpointError: If the file cannot be read.
        """
        return PlainReader(file, self.entry, self.geometry).read(block, workspace, memory).rows

    def not_finite(self, block: RowBlock, error: NonFiniteRowError) -> CheckpointError:
        """The error for a row block that holds NaN or infinity; it names tensor and row."""
        row = self.geometry.first_row(block) + error.row
        return CheckpointError(
            f"{self.shard.name}: {self.name!r} row {row} holds NaN or infinity, which have no "
            f"magnitude to rank: repair the checkpoint or leave the tensor out with --ignore"
        )

    def layout(self, choose: Callable[[], RowLayout]) -> RowLayout:
        """The layout for the whole tensor; chosen by the first caller, whichever thread that is."""
        return self._layout.get(choose)

    @property
    def decided_layout(self) -> RowLayout:
        """The layout, once `layout` has decided it."""
        return self._layout.value
