"""How a kernel ended: with all rows done, or at a row that it leaves to its caller."""

__all__ = [
    "BAD_ESCAPES",
    "BAD_LENGTH",
    "BAD_MASK",
    "BAD_STRIPE",
    "DONE",
    "DOUBTFUL",
    "NOT_FINITE",
]

DONE = 0
NOT_FINITE = 1
"""The row holds NaN or infinity."""
DOUBTFUL = 2
"""float64 cannot decide how many weights of the row stay."""
BAD_MASK = 3
"""The mask of a packed row names another number of weights than its table line."""
BAD_ESCAPES = 4
"""The values of a packed row mark another number of escapes than its table line."""
BAD_LENGTH = 5
"""A whole record is longer or shorter than its codes say."""
BAD_STRIPE = 6
"""A stripe of a whole record has bits past its last weight."""
