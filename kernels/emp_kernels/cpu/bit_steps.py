"""Steps on bytes and on stripes of bits, 64 at a time, that numba has no name for.

A *stripe* is one bit of each of some bytes, eight to a byte. Steps that move bytes (``move_past``,
``add_past``, ``look_up``) use instructions of AVX-512 VBMI and VBMI2 if they are asked to and the
CPU has them; otherwise they loop. `simd` says how an intrinsic of numba works.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils, types
from numba.extending import intrinsic

__all__ = [
    "LANES",
    "add_past",
    "add_stripe",
    "code_bits",
    "count_bits",
    "load_word",
    "look_up",
    "move_past",
    "set_stripe",
    "store_word",
]

LANES = 64
"""Bytes that one step handles: a bit of each fills a word of 64."""

_njit = numba.njit(nogil=True, cache=True)
_FEATURES = get_host_cpu_features()

_I1, _I8, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))
_FLAGS = ir.VectorType(_I1, LANES)
_BYTES = ir.VectorType(_I8, LANES)
_ZEROS = ir.Constant(_BYTES, [0] * LANES)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, element: Any) -> Any:
    """Address of array[index], as a pointer to `element`."""
    data = cgutils.create_struct_proxy(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), element.as_pointer())


def _splat(builder: Any, scalar: Any) -> Any:
    """A vector with the low byte of a scalar in every lane."""
    undefined = ir.Constant(_BYTES, ir.Undefined)
    first = builder.insert_element(undefined, builder.trunc(scalar, _I8), ir.Constant(_I32, 0))
    places = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return builder.shuffle_vector(first, undefined, places)


@intrinsic
def count_bits(_context: Any, word: Any) -> Any:
    """How many bits of a uint64 are set, int64."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), codegen


@intrinsic
def load_word(_context: Any, data: Any, at: Any) -> Any:
    """The uint64 whose bytes are data[at : at + 8], the first one lowest; all must be there."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, at = arguments
        place = _pointer(context, builder, signature.args[0], array, at, _I64)
        return builder.load(place, align=1)

    return types.uint64(data, types.int64), codegen


@intrinsic
def store_word(_context: Any, data: Any, at: Any, word: Any) -> Any:
    """Write a uint64 to data[at : at + 8], the lowest byte first."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, at, word = arguments
        place = _pointer(context, builder, signature.args[0], array, at, _I64)
        builder.store(word, place, align=1)
        return context.get_dummy_value()

    return types.void(data, types.int64, types.uint64), codegen


@intrinsic
def code_bits(_context: Any, codes: Any, start: Any, bit: Any, most: Any) -> Any:
    """A bit of each of codes[start : start + LANES], the first one's lowest: uint64.

    Of codes, uint8, that are `most` or more, the bit counts as set.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, start, bit, most = arguments
        place = _pointer(context, builder, signature.args[0], array, start, _BYTES)
        vector = builder.load(place, align=1)
        one = _splat(builder, builder.shl(ir.Constant(_I64, 1), bit))
        is_set = builder.icmp_unsigned("!=", builder.and_(vector, one), _ZEROS)
        is_past = builder.icmp_unsigned(">=", vector, _splat(builder, most))
        return builder.bitcast(builder.or_(is_set, is_past), _I64)

    return types.uint64(codes, types.int64, types.int64, types.int64), codegen


@intrinsic
def add_stripe(_context: Any, codes: Any, start: Any, word: Any, bit: Any) -> Any:
    """Set a bit of those of codes[start : start + LANES], uint8, that a stripe's word names."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, start, word, bit = arguments
        place = _pointer(context, builder, signature.args[0], array, start, _BYTES)
        one = _splat(builder, builder.shl(ir.Constant(_I64, 1), bit))
        added = builder.select(builder.bitcast(word, _FLAGS), one, _ZEROS)
        builder.store(builder.or_(builder.load(place, align=1), added), place, align=1)
        return context.get_dummy_value()

    return types.void(codes, types.int64, types.uint64, types.int64), codegen


@intrinsic
def set_stripe(_context: Any, codes: Any, start: Any, word: Any) -> Any:
    """Set codes[start : start + LANES], uint8, to the bits of a stripe's word, 0 or 1."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, start, word = arguments
        place = _pointer(context, builder, signature.args[0], array, start, _BYTES)
        builder.store(builder.zext(builder.bitcast(word, _FLAGS), _BYTES), place, align=1)
        return context.get_dummy_value()

    return types.void(codes, types.int64, types.uint64), codegen


@intrinsic
def _compress_past(_context: Any, codes: Any, start: Any, most: Any, at: Any) -> Any:
    """`move_past` for the codes at start and the LANES − 1 behind it, as an instruction."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, start, most, at = arguments
        kind = signature.args[0]
        vector = builder.load(_pointer(context, builder, kind, array, start, _BYTES), align=1)
        limit = _splat(builder, most)
        past = builder.icmp_unsigned(">=", vector, limit)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_BYTES, [_BYTES, _FLAGS, _BYTES]),
            "llvm.experimental.vector.compress.v64i8",
        )
        moved = builder.call(function, [builder.sub(vector, limit), past, _ZEROS])
        builder.store(moved, _pointer(context, builder, kind, array, at, _BYTES), align=1)
        return builder.ctpop(builder.bitcast(past, _I64))

    return types.int64(codes, types.int64, types.int64, types.int64), codegen


@intrinsic
def _expand_past(_context: Any, codes: Any, start: Any, most: Any, further: Any, at: Any) -> Any:
    """`add_past` for the codes at start and the LANES − 1 behind it, as an instruction."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, start, most, further, at = arguments
        place = _pointer(context, builder, signature.args[0], array, start, _BYTES)
        vector = builder.load(place, align=1)
        past = builder.icmp_unsigned("==", vector, _splat(builder, most))
        expand = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_BYTES, [_I8.as_pointer(), _FLAGS, _BYTES]),
            "llvm.masked.expandload.v64i8",
        )
        here = _pointer(context, builder, signature.args[3], further, at, _I8)
        added = builder.call(expand, [here, past, _ZEROS])
        builder.store(builder.add(vector, added), place, align=1)
        return builder.ctpop(builder.bitcast(past, _I64))

    return types.int64(codes, types.int64, types.int64, further, types.int64), codegen


@intrinsic
def _permute(_context: Any, table: Any, indices: Any, start: Any) -> Any:
    """`look_up` for the indices at start and the LANES − 1 behind it, as instructions."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, array, start = arguments
        quarters = [
            builder.load(
                _pointer(
                    context, builder, signature.args[0], values, ir.Constant(_I64, at), _BYTES
                ),
                align=1,
            )
            for at in range(0, 4 * LANES, LANES)
        ]
        place = _pointer(context, builder, signature.args[1], array, start, _BYTES)
        index = builder.load(place, align=1)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_BYTES, [_BYTES, _BYTES, _BYTES]),
            "llvm.x86.avx512.vpermi2var.qi.512",
        )
        low = builder.call(function, [quarters[0], index, quarters[1]])
        high = builder.call(function, [quarters[2], index, quarters[3]])
        is_low = builder.icmp_signed(">=", index, _ZEROS)
        builder.store(builder.select(is_low, low, high), place, align=1)
        return context.get_dummy_value()

    return types.void(table, indices, types.int64), codegen


@_njit
def _move_past_in_loop(code_N, n, most):
    at = 0
    for j in range(n):  # no branch: it would be mispredicted
        code = code_N[j]
        code_N[at] = np.uint8(code - most)
        at += code >= most
    return at


@_njit
def _move_past_in_steps(code_N, n, most):
    at = np.int64(0)
    for start in range(0, n, LANES):
        at += _compress_past(code_N, start, np.int64(most), at)
    return at


@_njit
def _add_past_in_loop(code_N, n, most, further_N):
    at = 0
    for j in range(n):
        past = np.uint8(code_N[j] == most)
        code_N[j] = np.uint8(code_N[j] + past * further_N[at])
        at += past


@_njit
def _add_past_in_steps(code_N, n, most, further_N):
    at = np.int64(0)
    for start in range(0, n, LANES):
        at += _expand_past(code_N, start, np.int64(most), further_N, at)


@_njit
def _look_up_in_loop(table, index_N, n):
    for i in range(n):
        index_N[i] = table[index_N[i]]


@_njit
def _look_up_in_steps(table, index_N, n):
    for start in range(0, n, LANES):
        _permute(table, index_N, start)


# a function that names an instruction which the CPU lacks does not compile, called or not
_HAS_VBMI = bool(_FEATURES.get("avx512vbmi") and _FEATURES.get("avx512vbmi2"))
_move_past = _move_past_in_steps if _HAS_VBMI else _move_past_in_loop
_add_past = _add_past_in_steps if _HAS_VBMI else _add_past_in_loop
_look_up = _look_up_in_steps if _HAS_VBMI else _look_up_in_loop


@_njit
def move_past(code_N, n, most, simd):
    """Move the codes that are `most` or more to the front, less by `most`; returns their number.

    Args:
        code_N: uint8, n codes and LANES items, which are 0; LANES behind the result are 0 again.
        n: How many codes.
        most: uint8.
        simd: Whether to use instructions that not every CPU has.
    """
    count = _move_past(code_N, n, most) if simd else _move_past_in_loop(code_N, n, most)
    code_N[count : count + LANES] = 0
    return count


@_njit
def add_past(code_N, n, most, further_N, simd):
    """Add the items of further_N, in order, to the codes that are `most`: undoes `move_past`.

    Args:
        code_N: uint8, n codes and LANES items, which are 0.
        n: How many codes.
        most: uint8.
        further_N: uint8, as many items as there are such codes, and LANES.
        simd: Whether to use instructions that not every CPU has.
    """
    if simd:
        _add_past(code_N, n, most, further_N)
    else:
        _add_past_in_loop(code_N, n, most, further_N)


@_njit
def look_up(table, index_N, n, simd):
    """Replace n indices i, uint8, by table[i], uint8 [256]; LANES more items are behind them."""
    if simd:
        _look_up(table, index_N, n)
    else:
        _look_up_in_loop(table, index_N, n)
