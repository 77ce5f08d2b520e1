"""Steps of decoding whole records with AVX-512, 64 weights at a time, from memory to registers.

They are for codes of few symbols, without dropped bits, see `emp_kernels.whole_tables.short_of`. A
kernel that calls them compiles only on a CPU that has the instructions, see
`emp_kernels.cpu.vectors`. They read up to 64 bytes past what they need.

The first tier is decoded along with the values. All later ones, which half a code a weight is in,
are decoded before that, to a *symbol* for each weight that gets past the first tier; so what is
left to do is to spread these among the codes of the first tier.

Legend: a *cursor* is four addresses: of values, of the first tier's lowest stripe, of the symbols
and of the escapes that come next. `record` is (bytes of the first tier's stripes, its bits, whether
there is a later one, whether weights escape, weights of the record). `tables` is (two vectors of
exponents, the symbol of weights that escape, the order of 32-bit lanes).
"""

import numba
import numpy as np

from emp_kernels.cpu.avx512 import expand_over, look_up, look_up_in_two
from emp_kernels.cpu.shuffles import interleave_high, interleave_low
from emp_kernels.cpu.vectors import (
    M64,
    U8x64,
    U16x32,
    U32x16,
    cast,
    count_ones,
    load,
    pick,
    splat,
    store,
    word_of,
)

__all__ = ["LANES", "load_tables", "read_tier", "step_floats", "step_halves", "step_words"]

LANES = 64
"""Weights of a step."""

_njit = numba.njit(nogil=True, cache=True, error_model="numpy")


@_njit
def load_tables(address, escape):
    """Load `tables` from 192 bytes: exponents, as `short_of` gives them, and the order of lanes."""
    return (
        load(U8x64, address),
        load(U8x64, address + 64),
        splat(U8x64, np.uint64(escape)),
        load(U8x64, address + 128),
    )


@_njit
def _bytes(value):
    return splat(U8x64, np.uint64(value))


@_njit
def _read_codes(at, stripe, width, base):
    """Read 64 codes of a tier, added to `base`, and which of them have all bits set."""
    past = load(M64, at)
    code = pick(past, base + _bytes(1), base)
    if width > 1:
        named = load(M64, at + stripe)
        code = pick(named, code + _bytes(2), code)
        past = past & named
    if width > 2:
        named = load(M64, at + 2 * stripe)
        code = pick(named, code + _bytes(4), code)
        past = past & named
    return code, past


@_njit
def read_tier(at, stripe, width, codes, base, later, to):
    """Decode a tier to symbols.

    Args:
        at: Address of its first code in the lowest stripe.
        stripe: Bytes of a stripe.
        width: Bits of a code.
        codes: How many codes to decode.
        base: The symbol that the code 0 stands for.
        later: Address of the symbols of the codes that have all bits set; 0 if no tier follows.
        to: Address to write to.
    """
    bases = _bytes(base)
    for start in range(0, codes, LANES):
        code, past = _read_codes(at + start // 8, stripe, width, bases)
        if later:
            code = expand_over(load(U8x64, later), past, code)
            later += count_ones(word_of(past))
        store(to + start, code)


@_njit
def _step_codes(cursor, record):
    """Read the symbols of 64 weights; returns them, and the cursor behind them."""
    values, codes, symbols, escapes = cursor
    stripe, width, deep, _, _ = record
    code, past = _read_codes(codes, stripe, width, _bytes(0))
    if deep:
        code = expand_over(load(U8x64, symbols), past, code)
    return code, (values + LANES, codes + 8, symbols + count_ones(word_of(past)), escapes)


@_njit
def _step_escapes(cursor, code, tables):
    """Read the exponents of weights that escape.

    Returns:
        (which ones do, a vector that starts with their exponents, the cursor behind them).
    """
    values, codes, symbols, escapes = cursor
    which = code == tables[2]
    return (
        which,
        load(U8x64, escapes),
        (values, codes, symbols, escapes + count_ones(word_of(which))),
    )


@_njit
def _step_bytes(cursor, record, tables):
    """Decode the two highest bytes of 64 weights of a format with exponents of eight bits.

    Returns:
        (the lower bytes, the highest ones, the cursor behind them).
    """
    value = load(U8x64, cursor[0])
    code, cursor = _step_codes(cursor, record)
    exponents = look_up_in_two(tables[0], code | (value & _bytes(0x60)), tables[1])
    low_bits, high_bit = _bytes(0x7F), _bytes(0x80)
    if record[3]:
        which, escaping, cursor = _step_escapes(cursor, code, tables)
        pairs, one, seven = cast(U16x32, escaping), np.uint64(1), np.uint64(7)
        down, up = pairs >> splat(U16x32, one), pairs << splat(U16x32, seven)
        turned = (cast(U8x64, down) & low_bits) | (cast(U8x64, up) & high_bit)
        exponents = expand_over(turned, which, exponents)
    low = (value & low_bits) | (exponents & high_bit)
    return low, (exponents & low_bits) | (value & high_bit), cursor


@_njit
def _step_half_bytes(cursor, record, tables):
    """The same of float16: a value is a byte, two bits that are the context, and the sign."""
    values, codes, _, _ = cursor
    stripe = record[0]
    code, cursor = _step_codes(cursor, record)
    index = code | pick(load(M64, codes - 3 * stripe), _bytes(0x20), _bytes(0))
    index = index | pick(load(M64, codes - 2 * stripe), _bytes(0x40), _bytes(0))
    high = look_up_in_two(tables[0], index, tables[1])
    if record[3]:
        which, escaping, cursor = _step_escapes(cursor, code, tables)
        # places of bits within pairs of bytes: what enters a byte from its neighbour is masked
        context = cast(U16x32, index) >> splat(U16x32, np.uint64(5))
        exponents = cast(U16x32, escaping) << splat(U16x32, np.uint64(2))
        exponents = expand_over(cast(U8x64, exponents) & _bytes(0x7C), which, _bytes(0))
        high = pick(which, exponents | (cast(U8x64, context) & _bytes(3)), high)
    sign = pick(load(M64, codes - stripe), _bytes(0x80), _bytes(0))
    return load(U8x64, values), high | sign, cursor


@_njit
def _ordered(vector, tables):
    return cast(U8x64, look_up(cast(U32x16, vector), cast(U32x16, tables[3])))


@_njit
def _words(low, high, tables):
    """Two vectors of 16-bit weights, from their lower bytes and their higher ones."""
    low, high = _ordered(low, tables), _ordered(high, tables)
    return cast(U16x32, interleave_low(low, high)), cast(U16x32, interleave_high(low, high))


@_njit
def step_words(cursor, record, tables):
    """Decode 64 bfloat16 weights.

    Returns:
        (the first 32, the others, the cursor behind them).
    """
    low, high, cursor = _step_bytes(cursor, record, tables)
    first, second = _words(low, high, tables)
    return first, second, cursor


@_njit
def step_halves(cursor, record, tables):
    """The same of float16."""
    low, high, cursor = _step_half_bytes(cursor, record, tables)
    first, second = _words(low, high, tables)
    return first, second, cursor


@_njit
def step_floats(cursor, record, tables):
    """Decode 64 float32 weights.

    Returns:
        (four vectors of 16, the cursor behind them).
    """
    third, n = cursor[0], record[4]
    low, high, cursor = _step_bytes(cursor, record, tables)
    low, high = _ordered(low, tables), _ordered(high, tables)
    first = _ordered(load(U8x64, third - 2 * n), tables)
    second = _ordered(load(U8x64, third - n), tables)
    a, b = cast(U16x32, interleave_low(first, second)), cast(U16x32, interleave_low(low, high))
    c, d = cast(U16x32, interleave_high(first, second)), cast(U16x32, interleave_high(low, high))
    weights = (
        interleave_low(a, b),
        interleave_high(a, b),
        interleave_low(c, d),
        interleave_high(c, d),
    )
    return weights, cursor
