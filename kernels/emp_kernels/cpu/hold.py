"""Checks packed rows that are to be held in memory, and finds where their escapes belong.

Legend as in `emp_kernels.cpu.unpack`; place_E are the places of all escapes, each among the kept
weights of its row.
"""

import numba

from emp_kernels.cpu.status import DONE
from emp_kernels.cpu.unpack import check_mask, decode_row

__all__ = ["check_block"]

_njit = numba.njit(nogil=True, cache=True)


@_njit
def check_block(
    payload,
    sections_R4,
    table_R3,
    columns,
    number_format,
    layout,
    place_E,
    kept_K,
    delta_K,
    code_K,
):
    """Check all that records say, as `emp_kernels.cpu.unpack.unpack_block` does.

    Arguments and result are those of that function, but that place_E, uint16 or uint32 [E], is
    written, and no rows are.
    """
    at, e = 0, 0
    for r in range(len(table_R3)):
        k, escaped, base = table_R3[r]
        ended = decode_row(
            payload,
            at,
            sections_R4[r],
            (k, escaped, base),
            number_format,
            layout,
            kept_K,
            delta_K,
            code_K,
        )
        if ended == DONE:
            ended = check_mask(payload, at, k, columns)
        if ended != DONE:
            return ended, r
        if escaped:
            _, _, _, _, limit, _ = layout
            e = _put_places(delta_K, k, limit, place_E, e)
        at += sections_R4[r].sum()
    return DONE, len(table_R3)


@_njit
def _put_places(delta_K, k, limit, place_E, e):
    """Write where distances are the limit to place_E[e:]; returns the end of what was written."""
    marker = delta_K.dtype.type(limit)
    for j in range(k):
        if delta_K[j] == marker:
            place_E[e] = j
            e += 1
    return e
