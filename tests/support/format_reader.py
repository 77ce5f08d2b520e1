"""A reader of the packed format written from `emp_llm/FORMAT.md` alone: it knows no code of ours.

Slow, and as plain as the specification. Weights are bit patterns, uint16 or uint32.
"""

from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path

import numpy as np
from safetensors import safe_open

WIDTHS = {1: (16, 7), 2: (16, 10), 3: (32, 23)}  # number format: B, M
DIGITS = {1: 0, 2: 8, 3: 5, 4: 4, 6: 3, 16: 2}


class DamagedError(Exception):
    """What a reader has to refuse."""


@dataclass(frozen=True)
class Parameters:
    """What `X.emp_meta` says in version 1, except for the shape; `columns` is C."""

    number_format: int
    dropped: int
    radix: int
    align: int
    columns: int

    @property
    def bits(self) -> int:
        return WIDTHS[self.number_format][0]

    @property
    def mantissa(self) -> int:
        return WIDTHS[self.number_format][1]

    @property
    def stored(self) -> int:
        return self.mantissa - self.dropped


def read_packed(path: Path) -> dict[str, np.ndarray]:
    """The packed tensors of a shard, by name."""
    found = {}
    with safe_open(path, "np") as file:
        for meta_name in file.keys():  # noqa: SIM118 (a safe_open is not a mapping)
            if meta_name.endswith(".emp_meta"):
                name = meta_name.removesuffix(".emp_meta")
                records, table = file.get_tensor(name), file.get_tensor(name + ".emp_rows")
                assert records.dtype == table.dtype == np.uint8
                meta = file.get_tensor(meta_name)
                assert meta.dtype == np.int64
                found[name] = read_tensor(records.tobytes(), table.tobytes(), meta.tolist())
    return found


def read_tensor(records: bytes, table: bytes, meta: list[int]) -> np.ndarray:
    """One tensor from its three planes."""
    if meta[0] == 2:
        return _read_whole(records, table, meta)
    version, number_format, dropped, radix, align, transposed, *shape = meta
    assert version == 1
    assert number_format in WIDTHS
    assert 0 <= dropped <= WIDTHS[number_format][1]
    assert radix in DIGITS
    assert align in (1, 2, 4, 8, 16, 32, 64)
    assert transposed in (0, 1)
    assert len(meta) % 2 == len(records) % 16 == len(table) % 16 == 0
    if shape[-1] == 0:
        shape.pop()
    assert len(shape) >= 2
    assert min(shape) > 0
    *stack, first, last = shape
    rows_of_one, columns = (last, first) if transposed else (first, last)
    rows = prod(stack) * rows_of_one
    p = Parameters(number_format, dropped, radix, align, columns)

    item = np.dtype("<u2" if p.bits == 16 and columns <= 65535 else "<u4")
    _check_padding("row table", table, rows * 3 * item.itemsize)
    lines = np.frombuffer(table, item, rows * 3).reshape(rows, 3).tolist()
    dense, end = read_rows(records, lines, p)
    _check_padding("records", records, end)
    matrices = dense.reshape(prod(stack), rows_of_one, columns)
    return (matrices.swapaxes(1, 2) if transposed else matrices).reshape(shape)


def _check_padding(what: str, plane: bytes, used: int) -> None:
    if any(plane[used:]) or len(plane) != ceil(used / 16) * 16:
        raise DamagedError(what)


def read_rows(records: bytes, lines: list[list[int]], p: Parameters) -> tuple[np.ndarray, int]:
    """The rows that a table describes, [rows, columns], and where the last record ends."""
    at, rows = 0, []
    for kept, escaped, base in lines:
        row, at = _read_record(records, at, kept, escaped, base, p)
        rows.append(row)
    storage = np.uint16 if p.bits == 16 else np.uint32
    return np.array(rows, storage).reshape(-1, p.columns), at


def _read_record(
    records: bytes, at: int, kept: int, escaped: int, base: int, p: Parameters
) -> tuple[list[int], int]:
    if not 0 <= escaped <= kept <= p.columns or base >= 2 ** (p.bits - 1 - p.dropped):
        raise DamagedError("table line")
    digits = DIGITS[p.radix]
    lengths = [
        ceil(p.columns / 8) if 0 < kept < p.columns else 0,
        ceil(kept * (1 + p.stored) / 8),
        ceil(kept / digits) if p.radix > 1 else 0,
        escaped * p.bits // 8,
    ]
    sections = []
    for length in lengths:
        sections.append(records[at : at + length])
        if len(sections[-1]) != length:
            raise DamagedError("length")
        at = ceil((at + length) / p.align) * p.align
    weights = iter(_kept_weights(kept, escaped, base, sections[1:], p))
    keep = _kept_columns(sections[0], kept, p)
    return [next(weights) if kept_here else 0 for kept_here in keep], at


def _kept_columns(mask: bytes, kept: int, p: Parameters) -> list[int]:
    if kept in (0, p.columns):
        return [int(kept > 0)] * p.columns
    marks = [mask[c // 8] >> c % 8 & 1 for c in range(8 * len(mask))]
    if sum(marks) != kept or any(marks[p.columns :]):
        raise DamagedError("mask")
    return marks[: p.columns]


def _kept_weights(
    kept: int, escaped: int, base: int, sections: list[bytes], p: Parameters
) -> list[int]:
    values, codes, escapes = sections
    limit = p.radix * 2**p.stored - 1
    size = p.bits // 8
    aside = [int.from_bytes(escapes[i * size : (i + 1) * size], "little") for i in range(escaped)]
    weights = []
    for j, (sign, low) in enumerate(_values(values, kept, p)):
        distance = low + _code(codes, j, p) * 2**p.stored
        if distance == limit:
            if not aside:
                raise DamagedError("escapes")
            weights.append(aside.pop(0))
        else:
            key = base + distance << p.dropped
            if key >= 2 ** (p.bits - 1):
                raise DamagedError("key")
            weights.append(sign * 2 ** (p.bits - 1) + key)
    exponent = 2 ** (p.bits - 1) - 2**p.mantissa
    if aside or any(bits & exponent == exponent for bits in weights):
        raise DamagedError("escapes left over, NaN or infinity")
    return weights


def _values(values: bytes, kept: int, p: Parameters) -> list[tuple[int, int]]:
    """Sign and low bits of each kept weight."""
    whole, width = int.from_bytes(values, "little"), 1 + p.stored
    each = [whole >> j * width & (2**width - 1) for j in range(kept)]
    return [divmod(value, 2**p.stored) for value in each]


def _code(codes: bytes, j: int, p: Parameters) -> int:
    if p.radix == 1:
        return 0
    m = len(codes)
    return codes[j % m] // p.radix ** (j // m) % p.radix


@dataclass(frozen=True)
class Code:
    """What `X.emp_meta` says in version 2, except for the shape."""

    number_format: int
    dropped: int
    weights: int
    widths: tuple[int, ...]
    lists: tuple[tuple[int, ...], ...]

    @property
    def bits(self) -> int:
        return WIDTHS[self.number_format][0]

    @property
    def stored(self) -> int:
        return WIDTHS[self.number_format][1] - self.dropped

    @property
    def exponent_bits(self) -> int:
        return self.bits - 1 - WIDTHS[self.number_format][1]


def _read_whole(records: bytes, table: bytes, meta: list[int]) -> np.ndarray:
    version, number_format, dropped, weights, tiers, *rest = meta
    fields, shape = rest[:32], rest[32:]
    assert version == 2
    assert number_format in WIDTHS
    assert 0 <= dropped <= WIDTHS[number_format][1]
    assert len(meta) % 2 == len(records) % 16 == len(table) % 16 == 0
    if shape[-1] == 0:
        shape.pop()
    assert len(shape) >= 2
    assert min(shape) > 0
    assert 1 <= weights <= 2**22
    assert weights % shape[-1] == 0
    widths = []
    while tiers:
        tiers, width = divmod(tiers, 16)
        widths.append(width)
        assert 1 <= width <= 3
        assert len(widths) <= 8
    assert widths
    symbols = sum(2**width - 1 for width in widths)
    listed = b"".join(field.to_bytes(8, "little", signed=True) for field in fields)
    stored = WIDTHS[number_format][1] - dropped
    used = 64 * 2 ** min(2, stored)
    lists = tuple(tuple(listed[at : at + symbols]) for at in range(0, used, 64))
    code = Code(number_format, dropped, weights, tuple(widths), lists)
    assert symbols <= 2**code.exponent_bits
    assert not any(any(listed[at + symbols : at + 64]) for at in range(0, used, 64))
    assert not any(listed[used:])
    assert len(set(lists[0])) == symbols
    assert all(sorted(other) == sorted(lists[0]) for other in lists)
    assert max(lists[0]) < 2**code.exponent_bits

    total = prod(shape)
    count = ceil(total / weights)
    _check_padding("row table", table, 4 * count)
    lengths = np.frombuffer(table, "<u4", count).tolist()
    _check_padding("records", records, sum(lengths))
    dense, at = [], 0
    for number, length in enumerate(lengths):
        here = min(weights, total - number * weights)
        dense += read_whole_record(records[at : at + length], here, code)
        at += length
    return np.array(dense, np.uint16 if code.bits == 16 else np.uint32).reshape(shape)


def read_whole_record(record: bytes, count: int, code: Code) -> list[int]:
    """The weights of one record of version 2, which holds so many."""
    parts = _Parts(record)
    value_bits = 1 + code.stored
    planes = [parts.take(count) for _ in range(value_bits // 8)]
    stripes = [parts.take_stripe(count) for _ in range(value_bits % 8)]
    symbols, reached = [0] * count, list(range(count))
    for width in code.widths:
        bits = [parts.take_stripe(len(reached)) for _ in range(width)]
        codes = [sum(bits[i][k] << i for i in range(width)) for k in range(len(reached))]
        for j, number in zip(reached, codes, strict=True):
            symbols[j] += number
        reached = [j for j, number in zip(reached, codes, strict=True) if number == 2**width - 1]

    weights = []
    for j in range(count):
        value = sum(planes[i][j] << 8 * i for i in range(len(planes)))
        value += sum(stripes[i][j] << 8 * len(planes) + i for i in range(len(stripes)))
        sign, mantissa = divmod(value, 2**code.stored)
        listed = code.lists[mantissa // 2 ** max(0, code.stored - 2)]
        exponent, lost = _exponent(symbols[j], listed, parts, code)
        bits = sign << code.exponent_bits | exponent
        weights.append((bits << code.stored | mantissa) << code.dropped | lost)
    if parts.at != len(record):
        raise DamagedError("too long")
    return weights


def _exponent(symbol: int, listed: tuple[int, ...], parts: "_Parts", code: Code) -> tuple[int, int]:
    """Exponent and dropped bits of a weight; the next escape's, if it escapes."""
    if symbol < len(listed):
        return listed[symbol], 0
    aside = int.from_bytes(parts.take(ceil((code.exponent_bits + code.dropped) / 8)), "little")
    exponent, lost = divmod(aside, 2**code.dropped)
    if exponent >= 2**code.exponent_bits or (lost == 0 and exponent in listed):
        raise DamagedError("escape")
    return exponent, lost


class _Parts:
    """Takes a record apart, from its start."""

    def __init__(self, record: bytes) -> None:
        self.record, self.at = record, 0

    def take(self, nbytes: int) -> bytes:
        part = self.record[self.at : self.at + nbytes]
        if len(part) != nbytes:
            raise DamagedError("too short")
        self.at += nbytes
        return part

    def take_stripe(self, size: int) -> list[int]:
        stripe = self.take(ceil(size / 8))
        bits = [stripe[j // 8] >> j % 8 & 1 for j in range(8 * len(stripe))]
        if any(bits[size:]):
            raise DamagedError("stripe")
        return bits[:size]
