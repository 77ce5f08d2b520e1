"""Steps on vectors that are instructions of AVX-512, which not every CPU has.

A kernel that calls one compiles only where the CPU has it: ask `HAS_VBMI2` or `HAS_BF16` before a
worker is compiled. See `emp_kernels.cpu.vectors`.
"""

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.extending import intrinsic

from emp_kernels.cpu.vectors import F32x16, U32x16, call

__all__ = [
    "HAS_BF16",
    "HAS_VBMI2",
    "dot_bf16",
    "expand",
    "expand_over",
    "floats_of_patterns",
    "look_up",
    "look_up_in_rows",
    "look_up_in_two",
]

_FEATURES = get_host_cpu_features()
HAS_VBMI2 = bool(
    _FEATURES.get("avx512vbmi2")
    and _FEATURES.get("avx512vbmi")
    and _FEATURES.get("avx512bw")
    and _FEATURES.get("avx512vl")
    and _FEATURES.get("fma")
)
"""Whether the CPU has all steps but `dot_bf16`."""
HAS_BF16 = bool(HAS_VBMI2 and _FEATURES.get("avx512bf16"))
"""Whether it has `dot_bf16` too."""


class _BFloatType(ir.Type):
    """bfloat16, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloatType)

    def __hash__(self) -> int:
        return hash(_BFloatType)


@intrinsic
def expand(_context: Any, vector: Any, mask: Any) -> Any:
    """The first lanes of a vector in the lanes that a mask names, in order, zeros elsewhere."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        value, named = arguments
        zeros = ir.Constant(vector.llvm, None)
        name = f"llvm.x86.avx512.mask.expand.{vector.suffix}"
        return call(builder, name, vector.llvm, [value, zeros, named])

    return vector(vector, mask), codegen


@intrinsic
def expand_over(_context: Any, vector: Any, mask: Any, other: Any) -> Any:
    """The same, with the lanes of `other` elsewhere."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        value, named, over = arguments
        name = f"llvm.x86.avx512.mask.expand.{vector.suffix}"
        return call(builder, name, vector.llvm, [value, over, named])

    return vector(vector, mask, other), codegen


_PERMUTES = {"uint8": "qi", "uint16": "hi", "uint32": "si"}


@intrinsic
def look_up(_context: Any, table: Any, index: Any) -> Any:
    """table[i], a vector of 64 bytes, for each lane i of index; higher bits of it are ignored."""
    name = f"llvm.x86.avx512.permvar.{_PERMUTES[table.lane]}.512"

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return call(builder, name, table.llvm, arguments)

    return table(table, index), codegen


@intrinsic
def look_up_in_two(_context: Any, table: Any, index: Any, other: Any) -> Any:
    """The same in two vectors of 64 bytes, one behind the other."""
    lane = _PERMUTES[table.lane].replace("si", "d")
    name = f"llvm.x86.avx512.vpermi2var.{lane}.512"

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return call(builder, name, table.llvm, arguments)

    return table(table, index, other), codegen


@intrinsic
def look_up_in_rows(_context: Any, table: Any, index: Any) -> Any:
    """table[i], 16 bytes, for each byte i below 16 of index; each 16 bytes have their own table."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return call(builder, "llvm.x86.avx512.pshuf.b.512", table.llvm, arguments)

    return table(table, index), codegen


@intrinsic
def dot_bf16(_context: Any, sums: Any, a: Any, b: Any) -> Any:
    """Add, to each lane of sums, the products of two bf16 of a and b, uint16 patterns.

    Sums are float32; subnormals count as zero, operands and results.
    """

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        sums_value, *pair = arguments
        kind = ir.VectorType(_BFloatType(), 32)
        operands = [builder.bitcast(value, kind) for value in pair]
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        return call(builder, name, sums.llvm, [sums_value, *operands])

    return sums(sums, a, b), codegen


@intrinsic
def floats_of_patterns(_context: Any, vector: Any) -> Any:
    """The numbers that sixteen patterns of a format stand for, as float32: exact."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        patterns = arguments[0]
        if vector.lane == "float16":
            halves = builder.bitcast(patterns, ir.VectorType(ir.HalfType(), vector.lanes))
            return builder.fpext(halves, F32x16.llvm)
        if vector.lane == "bfloat16":
            wide = builder.zext(patterns, U32x16.llvm)
            shifts = ir.Constant(U32x16.llvm, [16] * vector.lanes)
            patterns = builder.shl(wide, shifts)
        return builder.bitcast(patterns, F32x16.llvm)

    return F32x16(vector), codegen
