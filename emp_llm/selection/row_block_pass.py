"""One pass over the row blocks of targets: read and examined on many threads, gathered in order.

A row block is some consecutive rows of one matrix of a tensor.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from emp_kernels.errors import NonFiniteRowError
from emp_kernels.rows import Patterns, Workspace

from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.runtime.devices import CPU, Devices
from emp_llm.runtime.pipeline import Advance, Piece, run_pieces
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.target import Target

__all__ = ["RowBlockPass", "RowBlockScan"]

Found = TypeVar("Found")


class RowBlockScan(ABC, Generic[Found]):
    """What a pass looks for in each row block, and what it does with what it finds."""

    def wants(self, _target: Target, _block: RowBlock) -> bool:
        """Whether a row block has to be read; called in order, when its turn to be read comes."""
        return True

    @abstractmethod
    def examine(
        self, target: Target, block: RowBlock, weights: Patterns, workspace: Workspace
    ) -> Found:
        """Find something in a row block; called on any thread, at the same time as for others.

        Args:
            target: The tensor.
            block: Which rows of it.
            weights: Their bit patterns, uint16 or uint32 [R, C].
            workspace: Buffers of the calling thread.

        Raises:
            NonFiniteRowError: If a row holds NaN or infinity.
        """

    @abstractmethod
    def gather(self, target: Target, block: RowBlock, found: Found) -> None:
        """Take what was found in a row block; called in the order of the blocks."""

    def skip(self, target: Target, block: RowBlock) -> None:
        """Take note of a row block that was not wanted; called in its turn instead of `gather`."""


@dataclass(frozen=True)
class RowBlockPass:
    """How passes read the row blocks of targets.

    Attributes:
        files: The targets' files.
        threads: Threads that read and examine.
        progress: Called with the bytes of each row block that was read.
        devices: Devices that the threads' kernels run on.
    """

    files: OpenFiles
    threads: int
    progress: Advance | None = None
    devices: Devices = CPU

    def run(self, targets: Iterable[Target], scan: RowBlockScan[Found]) -> None:
        """Pass over all row blocks of some targets, in order.

        Args:
            targets: The targets.
            scan: Examines the blocks and gathers the results.

        Raises:
            CheckpointError: If a target cannot be read or holds NaN or infinity.
        """
        run_pieces(
            self._pieces(targets, scan),
            threads=self.threads,
            devices=self.devices,
            progress=self.progress,
            abandon=self.files.abandon,
        )

    def _pieces(self, targets: Iterable[Target], scan: RowBlockScan[Found]) -> Iterator[Piece]:
        for target in targets:
            file = self.files.file(target.shard)
            for block in target.geometry.row_blocks():
                # asked when its turn comes, for what earlier row blocks gave may settle the matter
                if not scan.wants(target, block):
                    yield Piece.note(partial(scan.skip, target, block))
                    continue
                yield Piece(
                    target.geometry.block_bytes(block),
                    partial(_examine, scan, target, block, file),
                    partial(scan.gather, target, block),
                )


def _examine(
    scan: RowBlockScan[Found],
    target: Target,
    block: RowBlock,
    file: SourceFile,
    workspace: Workspace,
) -> Found:
    weights = target.read(file, block, workspace)
    try:
        return scan.examine(target, block, weights, workspace)
    except NonFiniteRowError as error:
        raise target.not_finite(block, error) from error
