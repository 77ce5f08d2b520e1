"""Where a row's record begins, learned from the rows before it while other programs pack them.

A record begins where the lengths of all records before it add up to, and other programs work on
those at the same time. It is computed by decoupled look-back (Merrill and Garland, "Single-pass
Parallel Prefix Scan with Decoupled Look-back", 2016), without a second kernel: each row publishes
the length of its record as soon as it is known, then adds up what the rows before it have
published, back to the nearest one that has published where its record ends, and publishes its own
end in turn. A row waits for rows before it only. As rows are given out in their order, by an atomic
counter, all of those are done or worked on by programs that run, so none waits for ever.
"""

import triton
import triton.language as tl

__all__ = ["END_KNOWN", "LENGTH_KNOWN", "begin_record"]

LENGTH_KNOWN = tl.constexpr(1 << 61)
END_KNOWN = tl.constexpr(1 << 62)
"""What a row has published besides a number of bytes: its record's length, or where that ends. The
number and this bit are one integer, so that they are written and read in one piece."""

_BYTES = tl.constexpr((1 << 61) - 1)


@triton.jit
def begin_record(state_ptr, row, nbytes, WINDOW: tl.constexpr):
    """Publish how long a row's record is, and learn from the rows before it where it begins.

    Args:
        state_ptr: int64 [R], all zero when the kernel starts: what each row has published.
        row: The row's number.
        nbytes: Bytes of its record, int64.
        WINDOW: Rows before its own that the program looks at, at a time: at least as many as it has
            threads, so that each row's state is read by one thread. With fewer rows, several
            threads would each read the same state, at different times; the reductions below may
            each use another thread's copy, and the row would count by its length in one of them and
            by its end in the other.

    Returns:
        Where the record begins, int64.
    """
    tl.atomic_xchg(state_ptr + row, nbytes | LENGTH_KNOWN)
    begin = tl.full([], 0, tl.int64)
    last = row.to(tl.int64) - 1  # `begin` counts all rows behind this one
    found = tl.full([], 0, tl.int32)
    while found == 0:
        before_W = last - tl.arange(0, WINDOW)
        state_W = tl.load(state_ptr + before_W, mask=before_W >= 0, other=END_KNOWN, volatile=True)
        # nearest row with a known end, WINDOW if none; before row 0 everything has ended, at byte 0
        nearest = tl.min(tl.where(state_W >= END_KNOWN, tl.arange(0, WINDOW), WINDOW), 0)
        needed_W = tl.arange(0, WINDOW) <= nearest
        # Where a row up to there has published nothing yet, all are read again.
        if tl.min(tl.where(needed_W, state_W, END_KNOWN), 0) != 0:
            begin += tl.sum(tl.where(needed_W, state_W & _BYTES, 0), 0)
            last -= WINDOW
            found = (nearest < WINDOW).to(tl.int32)
    tl.atomic_xchg(state_ptr + row, (begin + nbytes) | END_KNOWN)
    return begin
