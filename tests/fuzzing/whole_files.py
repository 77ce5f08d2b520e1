"""Packed tensors that are not pruned, whose planes are damaged or contradict each other.

They are checked as those that are: see `fuzzing.packed_files`.
"""

import numpy as np
from emp_kernels.dispatch import pack_whole, unpack_whole
from emp_kernels.numbers import BF16, F16, F32
from emp_kernels.whole_layout import WholeLayout
from fuzzing.choices import Choices, damaged
from fuzzing.packed_files import file_of, padded, spoiled_meta
from support.packing import whole_tensor
from support.rows import KINDS, lists_of, make_rows

from emp_llm.errors import EmpError
from emp_llm.tensors.planes import META_SUFFIX, ROWS_SUFFIX
from emp_llm.tensors.whole import WholeTensor

WIDTHS = [(1,), (2,), (3,), (1, 2), (1, 1, 1), (3, 3, 3, 3), (1, 1, 1, 1, 1, 1, 1, 1)]


def compile_kernels() -> None:
    """Have numba compile, or load, all that is called here; this takes up to a minute."""
    for number_format in (BF16, F32):
        layout = WholeLayout(
            number_format=number_format, weights=70, widths=(1,), exponents=lists_of([120])
        )
        weights = make_rows("gaussian", number_format, (1, 70))
        packed = pack_whole(weights, layout, impl="simd")
        for impl in ("scalar", "simd"):
            payload = packed.payload.copy()
            unpack_whole(payload, packed.lengths, layout, np.empty_like(weights), impl=impl)


def make_whole(choices: Choices) -> bytes:
    """A file with a packed tensor that is not pruned and a plain one, or nearly."""
    tensor, lengths, records = _packed(choices)
    meta, how = tensor.encode_meta(), choices.number(0, 9)
    if how <= 2:
        records = damaged(choices, records, [b"\0", b"\xff", b"\x80"])
    if how == 3:
        lengths[choices.place(len(lengths))] = choices.edge() % (1 << 32)
    if how in (4, 5):
        meta = spoiled_meta(choices, meta)
    if how == 5:
        lengths = _as_told(choices, meta, lengths)
    if how in (1, 2, 5, 6):
        lengths = _fitting(choices, lengths, len(records))
    rows = tensor.encode_table(np.array(lengths))
    if how == 7:
        rows = damaged(choices, rows, [bytes(16), b"\xff\xff", b"\1\0"])
    planes = {"x": padded(choices, records), "x" + ROWS_SUFFIX: rows, "x" + META_SUFFIX: meta}
    return file_of(choices, planes, odd=how == 8)


def _packed(choices: Choices) -> tuple[WholeTensor, list[int], bytes]:
    number_format = choices.pick([BF16, BF16, F16, F32])
    shape = (
        *choices.some(1, 3, lambda: choices.number(1, 4)),
        choices.pick([1, 7, 8, 9, 31, 32, 33, 63, 64, 65, choices.number(1, 200)]),
    )
    dropped_bits = choices.pick(
        [0, 0, 1, 3, 5, number_format.mantissa_bits - 1, number_format.mantissa_bits]
    )
    tensor = whole_tensor(
        shape,
        number_format,
        record_rows=choices.number(1, 8),
        widths=choices.pick(WIDTHS),
        dropped_bits=dropped_bits,
    )
    weights = make_rows(
        choices.pick(KINDS),
        number_format,
        (1, int(np.prod(shape))),
        seed=choices.number(0, 999),
        dropped_bits=choices.pick([0, dropped_bits]),
    )
    packed = pack_whole(weights, tensor.layout, impl="simd")
    return tensor, packed.lengths.tolist(), packed.payload.tobytes()


def _fitting(choices: Choices, lengths: list[int], nbytes: int) -> list[int]:
    """Lengths that add up to so many bytes: what is too much or too little goes to some of them."""
    lengths = [min(length, nbytes) for length in lengths]
    for _ in range(4):
        at = choices.place(len(lengths))
        lengths[at] = max(lengths[at] + nbytes - sum(lengths), 0)
    return lengths


def _as_told(choices: Choices, meta: bytes, lengths: list[int]) -> list[int]:
    """As many lengths as changed parameters ask for, if they are possible."""
    try:
        records = WholeTensor.decode_meta("x", meta).geometry.records
    except EmpError:
        return lengths
    if records > 1000:
        return lengths
    return [*lengths, *(choices.number(0, 99) for _ in range(records))][:records]
