"""Sums over the weights of each expert, streamed: no model is built, and no data is needed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from emp_kernels.dispatch import count_rows
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.numbers import FORMATS
from emp_kernels.rows import Workspace

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.errors import CheckpointError
from emp_llm.runtime.pipeline import Piece
from emp_llm.runtime.workers import Workers
from emp_llm.shrinking.axes import Axis
from emp_llm.shrinking.cut_parts import CutPart, cut_parts
from emp_llm.shrinking.cuts import Cut, kept_indices, numbered
from emp_llm.shrinking.expert_criteria import WeightSums
from emp_llm.shrinking.plan import ShrinkPlan

__all__ = ["weight_sums"]

_Sums = npt.NDArray[np.float64]
"""float64 [3]: the number of weights, Σ|w| and Σw²."""


def weight_sums(plan: ShrinkPlan, workers: Workers) -> dict[str, WeightSums]:
    """Sums over all weights of each expert's matrices.

    Args:
        plan: A checkpoint with its experts found.
        workers: What reads their weights.

    Returns:
        The sums, by the names of the decoder blocks that hold the experts.

    Raises:
        CheckpointError: If a weight cannot be read, is NaN or infinite, or is in a dtype other than
            float16, bfloat16 and float32.
    """
    structures = plan.structures["experts"]
    sums = {holder: np.zeros((structures.number, 3)) for holder in structures.holders}
    matrices = [
        matrix
        for shard in plan.checkpoint.shards
        for entry in shard.header.tensors
        for matrix in _matrices(plan, shard, entry)
    ]
    shards = [s for s in plan.checkpoint.shards if any(m.shard is s for m in matrices)]
    with plan.source.files(shards) as files:

        def pieces() -> Iterator[Piece]:
            for shard in shards:
                file = files.file(shard)
                for matrix in matrices:
                    if matrix.shard is shard:
                        yield from _pieces(matrix, file, sums[matrix.holder][matrix.expert])
                yield Piece.note(partial(files.done, shard))

        workers.progress.begin("scoring", sum(matrix.cut.new_entry.nbytes for matrix in matrices))
        workers.run(pieces(), files.abandon)
    return {holder: WeightSums(*sums_E3.T) for holder, sums_E3 in sums.items()}


@dataclass(frozen=True, kw_only=True)
class _Matrix:
    """A matrix of one expert: a tensor, or a part of one."""

    shard: Shard
    holder: str
    expert: int
    cut: Cut


def _matrices(plan: ShrinkPlan, shard: Shard, entry: TensorEntry) -> Iterator[_Matrix]:
    """The matrices of experts in a tensor; none if it holds other weights."""
    if entry.name not in plan.found.matrices:
        return
    structures = plan.structures["experts"]
    axes = plan.found.axes.get(entry.name, ())
    for axis in (axis for axis in axes if axis.kind == structures.kind):
        if entry.dtype not in FORMATS:
            raise CheckpointError(
                f"{entry.name!r} is {entry.dtype}; emp-llm scores experts of float16, bfloat16 and "
                "float32: load a dequantized checkpoint"
            )
        for expert, kept in _experts(axis, entry, structures.number):
            cut = Cut(entry, entry.name, kept)
            yield _Matrix(shard=shard, holder=axis.holder, expert=expert, cut=cut)


def _experts(
    axis: Axis, entry: TensorEntry, number: int
) -> Iterator[tuple[int, Mapping[int, npt.NDArray[np.int64]]]]:
    """The experts whose weights a tensor holds, and where along its dimensions."""
    if axis.part is not None:
        yield numbered(entry.name.split(".")[axis.part])[1], {}
    elif axis.dimension is not None:
        size = entry.shape[axis.dimension]
        for expert in range(number):
            yield expert, {axis.dimension: kept_indices((expert,), size, axis.widths)}


def _pieces(matrix: _Matrix, file: SourceFile, sums: _Sums) -> Iterator[Piece]:
    for part in cut_parts(matrix.cut):
        yield Piece(part.nbytes, partial(_sums, part, matrix, file), partial(_add, sums))


def _sums(part: CutPart, matrix: _Matrix, file: SourceFile, workspace: Workspace) -> _Sums:
    number_format = FORMATS[matrix.cut.entry.dtype]
    weights = part.read(file, workspace).view(number_format.storage).reshape(1, -1)
    try:
        s1, s2 = count_rows(weights, number_format, (1.0,)).stats[0]
    except NonFiniteRowError as error:
        raise CheckpointError(
            f"{matrix.shard.name}: {matrix.cut.entry.name!r} holds NaN or infinity, which have no "
            "magnitude to score: repair the checkpoint"
        ) from error
    return np.array([weights.size, s1, s2])


def _add(sums: _Sums, more: _Sums) -> None:
    sums += more
