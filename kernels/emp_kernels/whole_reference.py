"""Whole records in plain numpy: what every backend must give, bit for bit."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from emp_kernels.errors import DamagedRowError
from emp_kernels.rows import Bytes, Counts, Patterns
from emp_kernels.whole_layout import WholeLayout

__all__ = ["count_reached", "pack_whole", "unpack_record", "unpack_whole"]

_BAD_LENGTH = "it is longer or shorter than its codes say"

Bits = npt.NDArray[np.uint8]
"""Items that are 0 or 1."""


def pack_whole(weights: Patterns, layout: WholeLayout) -> tuple[Bytes, Counts]:
    """Pack weights, uint16 or uint32 [N], to records.

    Returns:
        The records, uint8 [bytes], and the length of each, int64 [records].
    """
    records = [
        _record(weights[start : start + layout.weights], layout)
        for start in range(0, weights.size, layout.weights)
    ]
    lengths = np.array([len(record) for record in records], np.int64)
    return np.frombuffer(b"".join(records), np.uint8), lengths


def _record(weights: Patterns, layout: WholeLayout) -> bytes:
    number_format = layout.number_format
    bits = weights.astype(np.uint64)
    dropped, stored = np.uint64(layout.dropped_bits), np.uint64(layout.stored_bits)
    low = bits >> dropped & np.uint64((1 << layout.stored_bits) - 1)
    values = bits >> np.uint64(number_format.bits - 1) << stored | low
    parts = [
        (values >> np.uint64(8 * i)).astype(np.uint8).tobytes()
        for i in range(layout.value_bits // 8)
    ]
    left = range(layout.value_bits // 8 * 8, layout.value_bits)
    parts += [_stripe(values >> np.uint64(bit)) for bit in left]

    exponents = (bits & np.uint64(number_format.key_mask)) >> np.uint64(number_format.mantissa_bits)
    lost = bits & np.uint64((1 << layout.dropped_bits) - 1)
    ranks = [{exponent: rank for rank, exponent in enumerate(one)} for one in layout.exponents]
    pairs = zip(_contexts(low, layout).tolist(), exponents.tolist(), strict=True)
    symbols = np.array([ranks[context].get(e, layout.symbols) for context, e in pairs])
    symbols[lost != 0] = layout.symbols
    for width in layout.widths:
        goes_on = (1 << width) - 1
        codes = np.minimum(symbols, goes_on)
        parts += [_stripe(codes >> bit) for bit in range(width)]
        symbols = symbols[codes == goes_on] - goes_on
        exponents, lost = exponents[codes == goes_on], lost[codes == goes_on]
    parts += [
        int(item).to_bytes(layout.escape_bytes, "little") for item in exponents << dropped | lost
    ]
    return b"".join(parts)


def _contexts(low: npt.NDArray[np.uint64], layout: WholeLayout) -> npt.NDArray[np.uint64]:
    """The highest of the stored bits, which say what list of exponents is each weight's."""
    contexts: npt.NDArray[np.uint64] = low >> np.uint64(layout.stored_bits - layout.context_bits)
    return contexts


def _stripe(bits: npt.NDArray[np.integer]) -> bytes:
    """The lowest bit of each item, eight to a byte."""
    return np.packbits((bits & bits.dtype.type(1)).astype(np.uint8), bitorder="little").tobytes()


def unpack_whole(payload: Bytes, lengths: Counts, layout: WholeLayout, out: Patterns) -> None:
    """Decode records.

    Args:
        payload: uint8 [bytes], the records.
        lengths: int64 [records], the length of each; payload holds their sum.
        layout: The tensor's layout.
        out: uint16 or uint32 [N], written.

    Raises:
        DamagedRowError: If a record contradicts its length or itself.
    """
    at = 0
    for number, length in enumerate(lengths.tolist()):
        here = out[number * layout.weights : (number + 1) * layout.weights]
        try:
            here[:] = unpack_record(payload[at : at + length], here.size, layout)
        except ValueError as error:
            raise DamagedRowError(number, str(error)) from error
        at += length


def unpack_record(record: Bytes, n: int, layout: WholeLayout) -> npt.NDArray[np.uint64]:
    """The bit patterns of the n weights of a record.

    Raises:
        ValueError: If it contradicts its length or itself.
    """
    reader, number_format = _Reader(record), layout.number_format
    values = np.zeros(n, np.uint64)
    for i in range(layout.value_bits // 8):
        values |= reader.take(n).astype(np.uint64) << np.uint64(8 * i)
    left = range(layout.value_bits // 8 * 8, layout.value_bits)
    for bit, stripe in zip(left, reader.stripes(len(left), n), strict=True):
        values |= stripe.astype(np.uint64) << np.uint64(bit)
    symbols = np.zeros(n, np.int64)
    here = np.arange(n)
    for width in layout.widths:
        codes = np.zeros(here.size, np.int64)
        for bit, stripe in enumerate(reader.stripes(width, here.size)):
            codes |= stripe.astype(np.int64) << bit
        symbols[here] += codes
        here = here[codes == (1 << width) - 1]
    extras = np.array(list(reader.integers(here.size, layout.escape_bytes)), np.uint64)
    reader.end()
    dropped = np.uint64(layout.dropped_bits)
    _check_escapes(extras, layout)
    low = values & np.uint64((1 << layout.stored_bits) - 1)
    lists = np.array([[*one, 0] for one in layout.exponents], np.uint64)
    extras_all = lists[_contexts(low, layout), symbols] << dropped
    extras_all[here] = extras
    exponents = extras_all >> dropped << np.uint64(number_format.mantissa_bits)
    lost = extras_all & np.uint64((1 << layout.dropped_bits) - 1)
    signs = values >> np.uint64(layout.stored_bits) << np.uint64(number_format.bits - 1)
    weights: npt.NDArray[np.uint64] = signs | exponents | low << dropped | lost
    return weights


def count_reached(record: Bytes, n: int, layout: WholeLayout) -> list[int]:
    """How many of the n weights of a record get to each tier, and how many escape."""
    reader, counts = _Reader(record), [n]
    reader.take(n * (layout.value_bits // 8))
    reader.stripes(layout.value_bits % 8, n)
    for width in layout.widths:
        counts.append(int(reader.stripes(width, counts[-1]).all(axis=0).sum()))
    return counts


def _check_escapes(extras: npt.NDArray[np.uint64], layout: WholeLayout) -> None:
    exponents = extras >> np.uint64(layout.dropped_bits)
    lost = extras & np.uint64((1 << layout.dropped_bits) - 1)
    needless = np.isin(exponents, np.array(layout.exponents[0], np.uint64)) & (lost == 0)
    if (needless | (exponents >> np.uint64(layout.exponent_bits) > 0)).any():
        raise ValueError("it has an escape where none is needed")


class _Reader:
    """Takes the parts of a record, in order."""

    def __init__(self, record: Bytes) -> None:
        self._record = record
        self._at = 0

    def take(self, nbytes: int) -> Bytes:
        """The next bytes."""
        part = self._record[self._at : self._at + nbytes]
        self._at += nbytes
        if part.size != nbytes:
            raise ValueError(_BAD_LENGTH)
        return part

    def stripes(self, count: int, n: int) -> Bits:
        """The next stripes, of n bits each, [count, n]."""
        nbytes = (n + 7) // 8
        parts = self.take(count * nbytes).reshape(count, nbytes)
        bits = np.unpackbits(parts, axis=1, bitorder="little")
        if bits[:, n:].any():
            raise ValueError("a stripe has bits past its last weight")
        return bits[:, :n]

    def integers(self, count: int, nbytes: int) -> Iterator[int]:
        """The next integers of so many bytes."""
        for _ in range(count):
            yield int.from_bytes(self.take(nbytes).tobytes(), "little")

    def end(self) -> None:
        """Nothing may be left."""
        if self._at != self._record.size:
            raise ValueError(_BAD_LENGTH)
