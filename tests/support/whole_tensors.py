"""Layouts of whole records, and weights for them, of all kinds."""

import numpy as np
from emp_kernels.numbers import BF16, F16, F32
from emp_kernels.whole_layout import MAX_TIERS, MAX_WIDTH, WholeLayout
from hypothesis import strategies as st
from support.rows import KINDS, NUMBER_FORMATS, make_rows

SPECIAL = {
    BF16: [0, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F81, 1, 0x807F, 0x3F80],
    F16: [0, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0xFFFF, 0x7C01, 1, 0x83FF, 0x3C00],
    F32: [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0x7F800001, 1, 0x807FFFFF],
}
"""Zeros, infinities, NaN with several payloads, subnormal weights, one."""


@st.composite
def layouts(draw):
    number_format = draw(st.sampled_from(NUMBER_FORMATS))
    exponent_bits = number_format.bits - 1 - number_format.mantissa_bits
    widths, room = [], 1 << exponent_bits
    for width in draw(st.lists(st.integers(1, MAX_WIDTH), min_size=1, max_size=MAX_TIERS)):
        room -= (1 << width) - 1
        if room >= 0:
            widths.append(width)
    usual = {8: [126, 125, 124, 0, 127, 255, 123], 5: [14, 13, 12, 0, 15, 31, 11]}[exponent_bits]
    order = [*usual, *(e for e in range(1 << exponent_bits) if e not in usual)]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    if draw(st.booleans()):
        order = rng.permutation(order).tolist()
    listed = order[: sum((1 << width) - 1 for width in widths)]
    dropped_bits = draw(
        st.sampled_from([0, 0, 1, 3, number_format.mantissa_bits - 1])
        | st.integers(0, number_format.mantissa_bits)
    )
    contexts = 2 ** min(2, number_format.mantissa_bits - dropped_bits)
    return WholeLayout(
        number_format=number_format,
        weights=draw(st.sampled_from([1, 2, 7, 8, 9, 63, 64, 65, 100, 128, 129, 300])),
        widths=tuple(widths),
        exponents=tuple(tuple(rng.permutation(listed).tolist()) for _ in range(contexts)),
        dropped_bits=dropped_bits,
    )


@st.composite
def tensors(draw):
    layout = draw(layouts())
    number_format = layout.number_format
    count = draw(st.integers(1, 300))
    seed = draw(st.integers(0, 2**32))
    kind = draw(st.sampled_from([*KINDS, "constant", "special"]))
    if kind in KINDS:
        dropped = draw(st.sampled_from([0, layout.dropped_bits]))
        weights = make_rows(kind, number_format, (1, count), seed=seed, dropped_bits=dropped)[0]
    else:
        rng = np.random.default_rng(seed)
        some = SPECIAL[number_format] if kind == "special" else [rng.choice(SPECIAL[number_format])]
        weights = rng.choice(some, count).astype(number_format.storage)
    return layout, weights
