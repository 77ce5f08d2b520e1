"""A pass over targets that gathers something of every block of rows."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from emp_kernels.errors import NonFiniteRowError
from emp_kernels.rows import Workspace

from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.runtime.devices import CPU, Devices
from emp_llm.runtime.pipeline import Advance, Piece, run_pieces
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.target import Target

__all__ = ["BlockPass"]


@dataclass(frozen=True)
class BlockPass:
    """How targets are passed over.

    Attributes:
        files: Their files.
        threads: Threads that read and examine.
        progress: Told of the bytes that were read.
        devices: What the threads' kernels work on.
    """

    files: OpenFiles
    threads: int
    progress: Advance | None = None
    devices: Devices = CPU

    def run(
        self,
        targets: Iterable[Target],
        examine: Callable[[Target, RowBlock, Any, Workspace], Any],
        gather: Callable[[Target, RowBlock, Any], None],
        unless: Callable[[Target, RowBlock], bool] = lambda _t, _b: False,
    ) -> None:
        """Read and examine all blocks.

        Args:
            targets: The targets.
            examine: Told a block, its bit patterns and the workspace of its thread, on any thread.
            gather: Told a block and what was found in it, in the order of the blocks.
            unless: Blocks that are not read; None is found in them.

        Raises:
            CheckpointError: If a target cannot be read or holds NaN or infinity.
        """

        def look(target: Target, block: RowBlock, file: SourceFile, workspace: Workspace) -> Any:  # noqa: ANN401
            weights = target.read(file, block, workspace)
            try:
                return examine(target, block, weights, workspace)
            except NonFiniteRowError as error:
                raise target.not_finite(block, error) from error

        def pieces() -> Iterator[Piece]:
            for target in targets:
                file = self.files.file(target.shard)
                for block in target.geometry.row_blocks():
                    settle = partial(gather, target, block)
                    if unless(target, block):
                        yield Piece.note(partial(settle, None))
                    else:
                        nbytes = target.geometry.block_bytes(block)
                        yield Piece(nbytes, partial(look, target, block, file), settle)

        run_pieces(
            pieces(),
            threads=self.threads,
            devices=self.devices,
            progress=self.progress,
            abandon=self.files.abandon,
        )
