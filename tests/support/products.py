"""Activations, packed weights in memory that cannot be overrun, and how exact products must be."""

import numpy as np
from emp_kernels.numbers import F16
from support.rows import guarded, to_bits


def in_guarded_memory(payload):
    """The same bytes, behind which the process would end."""
    room = guarded(payload.size)
    room[:] = payload
    return room


def activations(number_format, shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return to_bits(rng.standard_normal(shape), number_format)


def spacing(values, number_format):
    """The distance of neighbouring numbers of a format, at least, from each value on."""
    bias = 15 if number_format is F16 else 127
    exponent = np.maximum(np.frexp(np.abs(values))[1] - 1, 1 - bias)
    return np.ldexp(1.0, exponent - number_format.mantissa_bits)


def allowed(w, x, exact, number_format):
    """How far a product may be off: float32 sums in any order, the bias added, rounded once."""
    terms = w.shape[1] + 1
    share = terms * 2.0**-24 / (1 - terms * 2.0**-24)
    off = share * (np.abs(x) @ np.abs(w).T + np.abs(exact))
    # dot products of bf16 may take subnormals for zero: of weights, of x, of products, of sums
    flushed = 4 * terms * 2.0**-126 * (1 + np.abs(x).max(initial=0) + np.abs(w).max(initial=0))
    return off + flushed + spacing(np.abs(exact) + off, number_format) / 2
