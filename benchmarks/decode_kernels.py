"""For `bench_decode.py`: products with packed weights alone, on one core, beside torch's linear.

Each way has so many copies of the matrix that no cache holds them, as in a model, and all ways take
turns. What counts is the best pass of each: another program only makes one slower.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from common import GB, gaussian, print_table, say
from emp_kernels.dispatch import pack_rows
from emp_kernels.held_dispatch import hold_rows, multiply_rows, unpack_held_rows
from emp_kernels.numbers import BF16, patterns_of_tensor, tensor_of_patterns
from kernel_basics import RULE, row_layout
from torch.nn.functional import linear

if TYPE_CHECKING:
    from collections.abc import Callable

    from emp_kernels.held import HeldRows

__all__ = ["measure_kernels", "print_kernels"]

SHAPES = ((11008, 4096), (4096, 11008), (5632, 2048), (2048, 5632))
TOKENS = (1, 4, 16)
PACKED, BF16_LINEAR, FP16_LINEAR = "packed", "torch bf16", "torch fp16"
TARGET = 5.0
"""Gweights/s of the packed product of one token, at least."""

_CACHES = 256 << 20
"""Bytes of packed copies, more than caches hold."""


@dataclass(frozen=True)
class Copies:
    """A matrix, over and over: packed, in bfloat16 and in float16.

    Attributes:
        rows: R.
        columns: C.
        held: Packed, as its records lie in memory.
        dense: Of the same weights, [R, C] in bfloat16.
        half: The same in float16.
    """

    rows: int
    columns: int
    held: list[HeldRows]
    dense: list[torch.Tensor]
    half: list[torch.Tensor]

    @property
    def weights(self) -> int:
        """Weights of one copy."""
        return self.rows * self.columns

    @property
    def packed_bytes(self) -> int:
        """Bytes of one packed copy, with its row table and what else is held beside it."""
        held = self.held[0]
        beside = held.table, held.offsets, held.escape_starts, held.escape_places
        return held.payload.nbytes + sum(array.nbytes for array in beside)


def measure_kernels(rounds: int) -> list[dict[str, Any]]:
    """Gweights/s of each shape, way and number of tokens, and GB/s of reading the same bytes."""
    before = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(before[1])})
    try:
        return [measure(*shape, rounds) for shape in SHAPES]
    finally:
        torch.set_num_threads(before[0])
        os.sched_setaffinity(0, before[1])


def measure(rows: int, columns: int, rounds: int) -> dict[str, Any]:
    """The rates of one shape."""
    say(f"products of {rows} × {columns}")
    copies = make_copies(rows, columns)
    check(copies)
    rates = {tokens: multiplied(copies, tokens, rounds) for tokens in TOKENS}
    return {
        "rows": rows,
        "columns": columns,
        "copies": len(copies.held),
        "packed_bytes_a_weight": copies.packed_bytes / copies.weights,
        "gweights_per_second": rates,
        "reading_gb_per_second": read(copies, rounds),
    }


def make_copies(rows: int, columns: int) -> Copies:
    """Packed rows of Gaussian weights, and what they unpack to."""
    layout = row_layout(BF16, columns)
    packed = pack_rows(gaussian(BF16, rows * columns, seed=0).reshape(rows, columns), layout, RULE)
    count = -(-_CACHES // packed.payload.nbytes)
    held = [hold_rows(packed.payload.copy(), packed.table, layout) for _ in range(count)]
    dense = unpacked(held[0])
    all_dense = [dense.clone() for _ in range(count)]
    return Copies(rows, columns, held, all_dense, [dense.half() for _ in range(count)])


def unpacked(held: HeldRows) -> torch.Tensor:
    """The weights of some rows, bfloat16 [R, C]."""
    out = np.empty((held.rows, held.layout.columns), np.uint16)
    unpack_held_rows(held, 0, held.rows, out)
    return tensor_of_patterns(out).view(torch.bfloat16)


def check(copies: Copies) -> None:
    """Compare products with those in float64, by the bound that `multiply_rows` states.

    Raises:
        AssertionError: If one is further off.
    """
    x = some_activations(max(TOKENS), copies.columns)
    found = torch.empty(len(x), copies.rows, dtype=torch.bfloat16)
    product(copies.held[0], x, found)
    exact = x.double() @ copies.dense[0].double().T
    scale = x.double().abs() @ copies.dense[0].double().abs().T
    unit = copies.columns * 2.0**-24
    most = unit / (1 - unit) * scale + exact.abs() * 2.0**-8
    if bool(((found.double() - exact).abs() > most).any()):
        raise AssertionError("a packed product is further off than its bound")


def some_activations(tokens: int, columns: int) -> torch.Tensor:
    """Activations of some tokens, bfloat16 [tokens, columns]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, columns, generator=generator).bfloat16()


def product(held: HeldRows, x: torch.Tensor, out: torch.Tensor) -> None:
    """The packed product of activations, on one thread."""
    multiply_rows(held, patterns_of_tensor(x), patterns_of_tensor(out), threads=1)


def multiplied(copies: Copies, tokens: int, rounds: int) -> dict[str, float]:
    """Gweights/s of each way to multiply by all copies, each weight once for all tokens."""
    x = some_activations(tokens, copies.columns)
    half, out = x.half(), torch.empty(tokens, copies.rows, dtype=torch.bfloat16)
    actions: dict[str, Callable[[int], object]] = {
        PACKED: lambda i: product(copies.held[i], x, out),
        BF16_LINEAR: lambda i: linear(x, copies.dense[i]),
        FP16_LINEAR: lambda i: linear(half, copies.half[i]),
    }
    count = max(1, len(copies.held) // tokens)
    best = best_seconds(actions, count, rounds)
    return {name: count * copies.weights / GB / seconds for name, seconds in best.items()}


def read(copies: Copies, rounds: int) -> dict[str, float]:
    """GB/s at which the bytes of the packed and of the dense copies are read, and only added up."""
    words = {
        PACKED: [torch.from_numpy(it.payload[: it.payload.size & -8]) for it in copies.held],
        BF16_LINEAR: [dense.view(-1).view(torch.uint8) for dense in copies.dense],
    }
    sums: dict[str, Callable[[int], object]] = {
        name: lambda i, each=each: each[i].view(torch.int64).sum() for name, each in words.items()
    }
    best = best_seconds(sums, len(copies.held), rounds)
    return {
        name: sum(part.nbytes for part in words[name]) / GB / seconds
        for name, seconds in best.items()
    }


def best_seconds(
    actions: dict[str, Callable[[int], object]], count: int, rounds: int
) -> dict[str, float]:
    """The shortest of some passes over `count` copies, of each way in turn."""
    best = dict.fromkeys(actions, float("inf"))
    for number in range(rounds + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            for i in range(count):
                action(i)
            if number:  # the first pass warms up
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def print_kernels(cases: list[dict[str, Any]]) -> None:
    """Prints the rates, and from which bandwidth on dense weights are read faster."""
    ways = (PACKED, BF16_LINEAR, FP16_LINEAR)
    print(
        f"products alone, one core, bf16, pruned at β = {RULE.beta:g}: Gweights/s, each weight "
        "counted once for all tokens\n"
    )
    rows = [["", "tokens", *ways, "÷ bf16", "÷ fp16"]]
    for case in cases:
        for tokens, rates in case["gweights_per_second"].items():
            ratios = [f"{rates[PACKED] / rates[other]:.2f}" for other in ways[1:]]
            cells = [f"{rates[way]:.2f}" for way in ways]
            rows.append([_shape(case), str(tokens), *cells, *ratios])
    print_table(rows)
    print(
        f"\ntargets, one token: packed ≥ {TARGET:g} and ÷ bf16 ≥ 1.00\n\n"
        "reading the bytes of the same weights, GB/s, and what this would allow, Gweights/s\n"
    )
    rows = [["", "bytes a weight", PACKED, "", "dense bf16", ""]]
    rows += [_reading(case) for case in cases]
    print_table(rows)
    print(
        "\nA core that reads B GB/s multiplies by B / 2 G dense bf16 weights a second at most. "
        "With packed\nones, of b bytes each, it reaches B / b, and at most P, the rate above. So "
        "packed wins where a core\nhas less than B = 2 · P for itself:\n"
    )
    print_table([[_shape(case), f"{2 * _rate(case):.1f} GB/s a core"] for case in cases])


def _shape(case: dict[str, Any]) -> str:
    return f"{case['rows']} × {case['columns']}"


def _rate(case: dict[str, Any]) -> float:
    rate: float = case["gweights_per_second"][TOKENS[0]][PACKED]
    return rate


def _reading(case: dict[str, Any]) -> list[str]:
    size, speeds = case["packed_bytes_a_weight"], case["reading_gb_per_second"]
    cells = [_shape(case), f"{size:.3f}"]
    for way, nbytes in ((PACKED, size), (BF16_LINEAR, 2)):
        cells += [f"{speeds[way]:.1f}", f"{speeds[way] / nbytes:.1f}"]
    return cells
