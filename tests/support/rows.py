"""Rows of weights to try kernels on, as bit patterns, and memory that cannot be overrun."""

import ctypes
import mmap
from collections.abc import Iterable

import numpy as np
from emp_kernels.numbers import BF16, F16, F32, NumberFormat
from emp_kernels.rows import Workspace

NUMBER_FORMATS = (BF16, F16, F32)

KINDS = (
    "gaussian",
    "heavy tailed",
    "ties",
    "all equal",
    "all zero",
    "one non-zero",
    "subnormal",
    "an outlier",
    "any finite bits",
)


def to_bits(values: np.ndarray, number_format: NumberFormat) -> np.ndarray:
    """Floats as bit patterns; bfloat16 by truncation."""
    if number_format is F16:
        return np.clip(values, -65504, 65504).astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32)
    return bits if number_format is F32 else (bits >> 16).astype(np.uint16)


def to_floats(bits: np.ndarray, number_format: NumberFormat) -> np.ndarray:
    """Bit patterns as float64."""
    if number_format is F16:
        return bits.view(np.float16).astype(np.float64)
    wide = bits if number_format is F32 else bits.astype(np.uint32) << 16
    return wide.view(np.float32).astype(np.float64)


def make_rows(
    kind: str,
    number_format: NumberFormat,
    shape: tuple[int, int],
    *,
    seed: int = 0,
    dropped_bits: int = 0,
) -> np.ndarray:
    """Rows of a kind, uint16 or uint32 [R, C]; their `dropped_bits` lowest bits are zero."""
    rng = np.random.default_rng([seed, *shape])
    gaussian = rng.standard_normal(shape) * 0.02
    if kind == "gaussian":
        bits = to_bits(gaussian, number_format)
    elif kind == "heavy tailed":
        bits = to_bits(gaussian / rng.uniform(0.001, 1, shape) ** 2, number_format)
    elif kind == "ties":
        bits = to_bits(rng.choice([-1.5, -1.0, -0.0, 0.0, 1.0, 2.0], shape), number_format)
    elif kind == "all equal":
        bits = to_bits(rng.choice([-0.75, 0.75], shape), number_format)
    elif kind == "all zero":
        bits = to_bits(rng.choice([-0.0, 0.0], shape), number_format)
    elif kind == "one non-zero":
        values = np.zeros(shape)
        values[:, rng.integers(shape[1])] = -3.0
        bits = to_bits(values, number_format)
    elif kind == "an outlier":
        gaussian[:, rng.integers(shape[1])] = 3e38
        bits = to_bits(gaussian, number_format)
    else:
        top = (
            number_format.infinity
            if kind == "any finite bits"
            else 1 << (number_format.mantissa_bits)
        )
        signs = rng.integers(0, 2, shape) << (number_format.bits - 1)
        bits = (rng.integers(0, top, shape) | signs).astype(number_format.storage)
    return bits >> dropped_bits << dropped_bits


def golden_values(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Numbers in (−1, 1), most of them small, from a generator that every language has."""
    values = []
    for _ in range(int(np.prod(shape))):
        seed = (seed * 1103515245 + 12345) % 2**31
        values.append(((seed >> 8) / 2**22 - 1) ** 3)
    return np.array(values).reshape(shape)


def lists_of(exponents: Iterable[int], stored_bits: int = 7) -> tuple[tuple[int, ...], ...]:
    """Lists of exponents for whole records: each starts one exponent later than that before it."""
    first = tuple(exponents)
    starts = [i % len(first) for i in range(2 ** min(2, stored_bits))]
    return tuple(first[start:] + first[:start] for start in starts)


def zeros_elsewhere(bits: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The kept patterns in their places and +0.0 in the others."""
    return np.where(keep, bits, bits.dtype.type(0))


def guarded(nbytes: int) -> np.ndarray:
    """Writable uint8 memory whose end no one reads or writes past: there the process would end."""
    room = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, room + mmap.PAGESIZE), np.uint8)
    forbidden = ctypes.c_void_p(memory.ctypes.data + room)
    no_access = 0
    assert ctypes.CDLL(None).mprotect(forbidden, ctypes.c_size_t(mmap.PAGESIZE), no_access) == 0
    return memory[room - nbytes : room]


class GuardedWorkspace(Workspace):
    """Gives out buffers that hold one byte all over, and that cannot be overrun."""

    def __init__(self, filled_with: int) -> None:
        super().__init__()
        self._filled_with = filled_with

    def take(self, name: str, nbytes: int) -> np.ndarray:  # noqa: ARG002 (none is used again)
        buffer = guarded(nbytes)
        buffer[:] = self._filled_with
        return buffer
