"""Steps that take lanes from fixed places of two vectors, on any CPU."""

from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from emp_kernels.cpu.vectors import Vector

__all__ = ["interleave_high", "interleave_low", "rows_high", "rows_low"]


def _lane_bits(vector: Vector) -> int:
    width: int = vector.llvm.element.width
    return width


def _shuffled(name: str, doc: str, places: Any) -> Any:
    """A step on two vectors of a kind that takes lanes from fixed places of both."""

    def step(_context: Any, vector: Any, other: Any) -> Any:
        taken = places(vector)

        def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            order = ir.Constant(ir.VectorType(ir.IntType(32), len(taken)), taken)
            return builder.shuffle_vector(*arguments, order)

        return vector(vector, other), codegen

    step.__name__ = step.__qualname__ = name
    step.__doc__ = doc
    return intrinsic(step)


def _interleaved(vector: Vector, half: int) -> list[int]:
    """Lanes of two vectors in turn, from the low or the high half of each 16 bytes."""
    in_row = 128 // _lane_bits(vector)
    rows = range(0, vector.lanes, in_row)
    first = half * in_row // 2
    return [
        lane + other
        for row in rows
        for lane in range(row + first, row + first + in_row // 2)
        for other in (0, vector.lanes)
    ]


interleave_low = _shuffled(
    "interleave_low",
    "Lanes of two vectors in turn, from the low half of each 16 bytes.",
    lambda vector: _interleaved(vector, 0),
)
interleave_high = _shuffled(
    "interleave_high",
    "Lanes of two vectors in turn, from the high half of each 16 bytes.",
    lambda vector: _interleaved(vector, 1),
)


def _rows(vector: Vector, half: int) -> list[int]:
    """Pieces of 16 bytes of two vectors in turn, from the low or the high half of each."""
    in_row = 128 // _lane_bits(vector)
    first = half * vector.lanes // 2
    return [
        lane + other
        for row in range(first, first + vector.lanes // 2, in_row)
        for other in (0, vector.lanes)
        for lane in range(row, row + in_row)
    ]


rows_low = _shuffled(
    "rows_low",
    "Pieces of 16 bytes of two vectors in turn, from the low half of each.",
    lambda vector: _rows(vector, 0),
)
rows_high = _shuffled(
    "rows_high",
    "Pieces of 16 bytes of two vectors in turn, from the high half of each.",
    lambda vector: _rows(vector, 1),
)
