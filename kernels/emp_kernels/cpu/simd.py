"""Vector compression and expansion: the lanes that a mask names, side by side, and back.

numba has no vector types, and LLVM makes no compression out of a loop. So these steps are written
as LLVM code, in its portable vector operations. On a CPU with AVX-512 VBMI2 compression and
expansion are one instruction each (``vpcompressw``, ``vpexpandw``); elsewhere LLVM spells them out
lane by lane, correctly but slowly, and the scalar loops of `select` and `unpack` run instead (see
`emp_kernels.dispatch`).

numba calls an intrinsic twice: the function itself with the types of the arguments, to learn the
signature; then ``codegen`` with the values, to append instructions to the kernel's code.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

__all__ = ["VECTOR_BYTES", "bits_to_f32", "compress_given_step", "compress_step", "expand_step"]

VECTOR_BYTES = 64
"""Bytes that one step handles: 32 weights of 16 bits, 16 of 32."""

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)


@intrinsic
def bits_to_f32(_context: Any, bits: Any) -> Any:
    """The float32 whose bits are these uint32: numba has no such cast of a scalar."""

    def codegen(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.trunc(arguments[0], _I32), ir.FloatType())

    return types.float32(types.uint64), codegen


class _Lanes:
    """LLVM types and constants for one 64-byte vector of `lane_bits`-bit integers."""

    def __init__(self, lane_bits: int) -> None:
        self.count = VECTOR_BYTES * 8 // lane_bits
        self.lane = ir.IntType(lane_bits)
        self.vector = ir.VectorType(self.lane, self.count)
        self.flags = ir.VectorType(ir.IntType(1), self.count)
        self.mask = ir.IntType(self.count)
        self.suffix = f"v{self.count}i{lane_bits}"
        self.item_bytes = lane_bits // 8

    def splat(self, builder: Any, scalar: Any) -> Any:
        """A vector with a scalar in every lane."""
        undefined = ir.Constant(self.vector, ir.Undefined)
        first = builder.insert_element(
            undefined, builder.trunc(scalar, self.lane), ir.Constant(_I32, 0)
        )
        zeros = ir.Constant(ir.VectorType(_I32, self.count), [0] * self.count)
        return builder.shuffle_vector(first, undefined, zeros)

    def constant(self, values: list[int]) -> Any:
        """A vector that is known when the kernel is compiled."""
        return ir.Constant(self.vector, values)

    def compress(self, builder: Any, vector: Any, keep: Any) -> Any:
        """Move the lanes that are kept to the front, in their order; the others are undefined."""
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(self.vector, [self.vector, self.flags, self.vector]),
            f"llvm.experimental.vector.compress.{self.suffix}",
        )
        return builder.call(function, [vector, keep, ir.Constant(self.vector, ir.Undefined)])


def _pointer(
    context: Any,
    builder: Any,
    array_type: Any,
    array: Any,
    index: Any,
    element: Any,
) -> Any:
    """Address of array[index], as a pointer to `element`."""
    data = cgutils.create_struct_proxy(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), element.as_pointer())


@intrinsic
def compress_step(
    _context: Any,
    weights: Any,
    column: Any,
    threshold: Any,
    ties: Any,
    kept: Any,
    at: Any,
    mask: Any,
    mask_at: Any,
) -> Any:
    """Keep, of one vector of weights, those whose keys reach a threshold.

    ``compress_step(weights, column, threshold, ties, kept, at, mask, mask_at) -> int64`` reads the
    vector at weights[column:], writes the kept weights to kept[at:] (a whole vector is stored, so
    kept needs that much room) and the mask bits to mask[mask_at:], and returns how many were kept.
    In the first `ties` lanes keys equal to the threshold are kept, in the others they are not.
    """
    lanes = _Lanes(weights.dtype.bitwidth)
    signature = types.int64(
        weights, types.int64, types.uint64, types.int64, kept, types.int64, mask, types.int64
    )

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, column, threshold, ties, target, at, bits, bits_at = arguments
        kinds = signature.args
        here = _pointer(context, builder, kinds[0], source, column, lanes.vector)
        vector = builder.load(here, align=lanes.item_bytes)
        sign = 1 << (lanes.item_bytes * 8 - 1)
        keys = builder.and_(vector, lanes.constant([sign - 1] * lanes.count))
        # behind the last tie that stays, a key must be one above the threshold
        late = builder.icmp_signed(
            ">=", lanes.constant(list(range(lanes.count))), lanes.splat(builder, ties)
        )
        needed = builder.add(lanes.splat(builder, threshold), builder.zext(late, lanes.vector))
        keep = builder.icmp_unsigned(">=", keys, needed)
        # to a register and from there whole: a masked store of kept lanes is microcode on Zen 4
        packed = lanes.compress(builder, vector, keep)
        builder.store(
            packed,
            _pointer(context, builder, kinds[4], target, at, lanes.vector),
            align=lanes.item_bytes,
        )
        mask_word = builder.bitcast(keep, lanes.mask)
        builder.store(
            mask_word, _pointer(context, builder, kinds[6], bits, bits_at, lanes.mask), align=1
        )
        return builder.zext(builder.ctpop(mask_word), _I64)

    return signature, codegen


@intrinsic
def compress_given_step(
    _context: Any, weights: Any, column: Any, mask: Any, mask_at: Any, kept: Any, at: Any
) -> Any:
    """Keep, of one vector of weights, those that a mask names.

    ``compress_given_step(weights, column, mask, mask_at, kept, at) -> int64`` reads the vector at
    weights[column:] and its mask bits at mask[mask_at:], writes the kept weights to kept[at:], a
    whole vector of them, and returns how many were kept.
    """
    lanes = _Lanes(weights.dtype.bitwidth)
    signature = types.int64(weights, types.int64, mask, types.int64, kept, types.int64)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, column, bits, bits_at, target, at = arguments
        kinds = signature.args
        here = _pointer(context, builder, kinds[0], source, column, lanes.vector)
        vector = builder.load(here, align=lanes.item_bytes)
        mask_word = builder.load(
            _pointer(context, builder, kinds[2], bits, bits_at, lanes.mask), align=1
        )
        builder.store(
            lanes.compress(builder, vector, builder.bitcast(mask_word, lanes.flags)),
            _pointer(context, builder, kinds[4], target, at, lanes.vector),
            align=lanes.item_bytes,
        )
        return builder.zext(builder.ctpop(mask_word), _I64)

    return signature, codegen


@intrinsic
def expand_step(
    _context: Any,
    kept: Any,
    at: Any,
    mask: Any,
    mask_at: Any,
    weights: Any,
    column: Any,
) -> Any:
    """Spread kept weights back over the lanes that a mask names, zeros elsewhere.

    ``expand_step(kept, at, mask, mask_at, weights, column) -> int64`` writes one vector to
    weights[column:] and returns how many kept weights it took.
    """
    lanes = _Lanes(weights.dtype.bitwidth)
    signature = types.int64(kept, types.int64, mask, types.int64, weights, types.int64)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, at, bits, bits_at, target, column = arguments
        kinds = signature.args
        mask_word = builder.load(
            _pointer(context, builder, kinds[2], bits, bits_at, lanes.mask), align=1
        )
        here = _pointer(context, builder, kinds[0], source, at, lanes.lane)
        expand = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(lanes.vector, [lanes.lane.as_pointer(), lanes.flags, lanes.vector]),
            f"llvm.masked.expandload.{lanes.suffix}",
        )
        zeros = lanes.constant([0] * lanes.count)
        spread = builder.call(expand, [here, builder.bitcast(mask_word, lanes.flags), zeros])
        builder.store(
            spread,
            _pointer(context, builder, kinds[4], target, column, lanes.vector),
            align=lanes.item_bytes,
        )
        return builder.zext(builder.ctpop(mask_word), _I64)

    return signature, codegen
