"""Vector types for numba, and the steps on them: a kernel keeps vectors in registers.

numba has no vector types. Here is one: variables of a kernel can hold vectors, and LLVM keeps them
in registers. Steps are LLVM code that compiles on any CPU; where its vectors are shorter, LLVM
takes several. `emp_kernels.cpu.avx512` has steps that only some CPUs know.

Memory is named by its address, an int64 (``array.ctypes.data``), for kernels that run on a team of
threads get addresses only (see `emp_kernels.cpu.team`). Nothing checks a bound. Vectors need not be
aligned.

`emp_kernels.cpu.simd` says how an intrinsic of numba works.
"""

import operator
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, register_model

__all__ = [
    "M16",
    "M32",
    "M64",
    "BF16x16",
    "F16x16",
    "F32x16",
    "U8x64",
    "U16x32",
    "U32x16",
    "Vector",
    "add_lanes",
    "call",
    "cast",
    "count_ones",
    "fused",
    "load",
    "load_bytes",
    "mask_of",
    "narrow",
    "pick",
    "prefetch",
    "shift_pair",
    "splat",
    "store",
    "store_some",
    "word_of",
]

_I32 = ir.IntType(32)
_LANES = {
    "bool": ir.IntType(1),
    "uint8": ir.IntType(8),
    "uint16": ir.IntType(16),
    "uint32": ir.IntType(32),
    "uint64": ir.IntType(64),
    "float32": ir.FloatType(),
    "float16": ir.IntType(16),  # patterns; so are those of bfloat16
    "bfloat16": ir.IntType(16),
}


class Vector(types.Type):
    """The type of a vector.

    Args:
        lane: "bool", "uint8", "uint16", "uint32", "uint64" or "float32"; "float16" and "bfloat16"
            are patterns, which can be moved and converted but not calculated with.
        lanes: Their number.
    """

    def __init__(self, lane: str, lanes: int) -> None:
        self.lane = lane
        self.lanes = lanes
        self.llvm = ir.VectorType(_LANES[lane], lanes)
        super().__init__(name=f"vector({lanes} x {lane})")

    @property
    def suffix(self) -> str:
        """What LLVM calls the type in names of functions."""
        bits = _LANES[self.lane]
        return f"v{self.lanes}{'f32' if self.lane == 'float32' else f'i{bits.width}'}"


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, kind.llvm)


U8x64, U16x32, U32x16 = Vector("uint8", 64), Vector("uint16", 32), Vector("uint32", 16)
F32x16 = Vector("float32", 16)
F16x16, BF16x16 = Vector("float16", 16), Vector("bfloat16", 16)
M16, M32, M64 = (Vector("bool", lanes) for lanes in (16, 32, 64))
"""Masks: what a comparison gives, a truth value a lane."""

_WORDS: dict[int, Any] = {16: types.uint16, 32: types.uint32, 64: types.uint64}


def call(builder: Any, name: str, result: Any, arguments: Any) -> Any:
    """Call a function of LLVM, in an intrinsic."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _splat(builder: Any, kind: Vector, scalar: Any) -> Any:
    undefined = ir.Constant(kind.llvm, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    places = ir.Constant(ir.VectorType(_I32, kind.lanes), [0] * kind.lanes)
    return builder.shuffle_vector(first, undefined, places)


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


# ── memory ──


@intrinsic
def load(_context: Any, kind: Any, address: Any) -> Any:
    """The vector of a kind, or the number of a dtype of numpy, at an address."""
    found = kind.instance_type

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        place = _pointer(builder, arguments[1], context.get_value_type(found))
        return builder.load(place, align=1)

    return found(kind, types.int64), codegen


@intrinsic
def load_bytes(_context: Any, kind: Any, address: Any) -> Any:
    """The bytes at an address, one in each lane of a vector of a kind."""
    found = kind.instance_type

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        place = _pointer(builder, arguments[1], ir.VectorType(_LANES["uint8"], found.lanes))
        return builder.zext(builder.load(place, align=1), found.llvm)

    return found(kind, types.int64), codegen


@intrinsic
def store(_context: Any, address: Any, vector: Any) -> Any:
    """Write a vector, or a number, to an address."""

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address, value = arguments
        builder.store(value, _pointer(builder, address, value.type), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, vector), codegen


@intrinsic
def store_some(_context: Any, address: Any, vector: Any, mask: Any) -> Any:
    """Write the lanes of a vector that a mask names; the memory of the others is not touched."""

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address, value, named = arguments
        place = _pointer(builder, address, vector.llvm)
        align = ir.Constant(_I32, 1)
        name = f"llvm.masked.store.{vector.suffix}.p0"
        kinds = [value.type, place.type, align.type, named.type]
        function = ir.FunctionType(ir.VoidType(), kinds)
        masked_store = cgutils.get_or_insert_function(builder.module, function, name)
        builder.call(masked_store, [value, place, align, named])
        return context.get_dummy_value()

    return types.void(types.int64, vector, mask), codegen


@intrinsic
def prefetch(_context: Any, address: Any) -> Any:
    """Begin to bring the memory at an address, which need not exist, to the second-level cache.

    The first level is small, and holds what a kernel is at work on.
    """

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        place = _pointer(builder, arguments[0], ir.IntType(8))
        to_read, keep, data = (ir.Constant(_I32, value) for value in (0, 2, 1))
        call(builder, "llvm.prefetch.p0", ir.VoidType(), [place, to_read, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


# ── lanes ──


@intrinsic
def splat(_context: Any, kind: Any, scalar: Any) -> Any:
    """A vector of a kind with a number in every lane, of which a lane takes the low bits."""
    vector = kind.instance_type
    number = types.float32 if vector.lane == "float32" else types.uint64

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        lane = _LANES[vector.lane]
        value = arguments[1]
        if vector.lane not in ("float32", "uint64"):
            value = builder.trunc(value, lane)
        return _splat(builder, vector, value)

    return vector(kind, number), codegen


@intrinsic
def cast(_context: Any, kind: Any, vector: Any) -> Any:
    """The same bits as a vector of another kind."""
    result = kind.instance_type

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[1], result.llvm)

    return result(kind, vector), codegen


@intrinsic
def narrow(_context: Any, kind: Any, vector: Any) -> Any:
    """The low bits of each lane in lanes that are no wider."""
    result = kind.instance_type

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if result.llvm == vector.llvm:
            return arguments[1]
        return builder.trunc(arguments[1], result.llvm)

    return result(kind, vector), codegen


@intrinsic
def pick(_context: Any, mask: Any, vector: Any, other: Any) -> Any:
    """The lanes of `vector` where a mask is set, those of `other` elsewhere."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.select(*arguments)

    return vector(mask, vector, other), codegen


@intrinsic
def mask_of(_context: Any, kind: Any, word: Any) -> Any:
    """The mask of a kind whose lanes are the bits of a word, the lowest one first."""
    mask = kind.instance_type

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        value = arguments[1]
        if mask.lanes < word.bitwidth:
            value = builder.trunc(value, ir.IntType(mask.lanes))
        return builder.bitcast(value, mask.llvm)

    return mask(kind, word), codegen


@intrinsic
def word_of(_context: Any, mask: Any) -> Any:
    """The lanes of a mask as bits of a word, the first one lowest."""
    word = _WORDS[mask.lanes]

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(mask.lanes))

    return word(mask), codegen


@intrinsic
def count_ones(_context: Any, word: Any) -> Any:
    """How many bits of an unsigned number are set, int64."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        found = builder.ctpop(arguments[0])
        return found if word.bitwidth == 64 else builder.zext(found, ir.IntType(64))

    return types.int64(word), codegen


# ── arithmetic ──


def _operator(symbol: Any, build: Any, *, floats: Any = None, compares: bool = False) -> None:
    """Let kernels write an operator between two vectors of a kind."""

    class Template(AbstractTemplate):
        def generic(self, arguments: Any, _keywords: Any) -> Any:
            if len(arguments) == 2 and isinstance(arguments[0], Vector):
                kind, other = arguments
                if kind == other and (floats or kind.lane != "float32"):
                    result = Vector("bool", kind.lanes) if compares else kind
                    return signature(result, kind, kind)
            return None

    infer_global(symbol)(Template)

    @lower_builtin(symbol, Vector, Vector)
    def lower(_context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        is_float = signature.args[0].lane == "float32"
        return (floats if is_float else build)(builder, *arguments)


_operator(operator.add, lambda b, x, y: b.add(x, y), floats=lambda b, x, y: b.fadd(x, y))
_operator(operator.sub, lambda b, x, y: b.sub(x, y), floats=lambda b, x, y: b.fsub(x, y))
_operator(operator.mul, lambda b, x, y: b.mul(x, y), floats=lambda b, x, y: b.fmul(x, y))
_operator(operator.and_, lambda b, x, y: b.and_(x, y))
_operator(operator.or_, lambda b, x, y: b.or_(x, y))
_operator(operator.xor, lambda b, x, y: b.xor(x, y))
_operator(operator.lshift, lambda b, x, y: b.shl(x, y))
_operator(operator.rshift, lambda b, x, y: b.lshr(x, y))
_operator(operator.lt, lambda b, x, y: b.icmp_unsigned("<", x, y), compares=True)
_operator(operator.eq, lambda b, x, y: b.icmp_unsigned("==", x, y), compares=True)


@intrinsic
def shift_pair(_context: Any, high: Any, low: Any, amount: Any) -> Any:
    """The low half of each pair of lanes, `high` above `low`, shifted right by less than a lane."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return call(builder, f"llvm.fshr.{high.suffix}", high.llvm, arguments)

    return high(high, low, amount), codegen


@intrinsic
def fused(_context: Any, a: Any, b: Any, c: Any) -> Any:
    """A · b + c of floats, rounded once where the CPU can, else twice."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return call(builder, f"llvm.fmuladd.{a.suffix}", a.llvm, arguments)

    return a(a, b, c), codegen


@intrinsic
def add_lanes(_context: Any, vector: Any) -> Any:
    """The sum of all lanes, float32: halves are added until one lane is left."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        value, lanes = arguments[0], vector.lanes
        while lanes > 1:
            lanes //= 2
            low, high = (
                ir.Constant(ir.VectorType(_I32, lanes), list(range(start, start + lanes)))
                for start in (0, lanes)
            )
            value = builder.fadd(
                builder.shuffle_vector(value, value, low),
                builder.shuffle_vector(value, value, high),
            )
        return builder.extract_element(value, ir.Constant(_I32, 0))

    return types.float32(vector), codegen
