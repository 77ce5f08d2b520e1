"""For `bench_decode.py`: products with packed weights alone, on one core, beside torch's linear.

Each way has so many copies of the matrix that no cache holds them, as in a model, and all ways take
turns. What counts is the best pass of each: another program only makes one slower.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from common import GB, gaussian, print_table, say
from emp_kernels.dispatch import prune_rows
from emp_kernels.numbers import BF16, tensor_of_patterns
from kernel_basics import RULE
from torch.nn.functional import linear

from emp_llm.resident.content import Content
from emp_llm.resident.held_planes import HeldPlanes
from emp_llm.resident.packing import PackedBefore, pack_rest, pack_tensor
from emp_llm.resident.weight import PackedWeight

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["measure_kernels", "print_kernels"]

SHAPES = ((11008, 4096), (4096, 11008), (5632, 2048), (2048, 5632))
FEW, MANY = (1, 4, 16), 512
"""Tokens that packed rows are multiplied by, and tokens for which they are unpacked by tiles."""
PRUNED, WHOLE, BF16_LINEAR, FP16_LINEAR = "pruned", "without loss", "torch bf16", "torch fp16"
WAYS = (PRUNED, WHOLE, BF16_LINEAR, FP16_LINEAR)
TARGET = 5.0
"""Gweights/s of the product of one token with a pruned matrix, at least."""

_CACHES = 256 << 20
"""Bytes of all packed copies: more than caches hold."""


@dataclass(frozen=True)
class Copies:
    """One matrix of R × C, over and over, in each way.

    Attributes:
        weights: By way, tensors [R, C]; those of `PRUNED` and `WHOLE` are packed in memory.
        nbytes: By way, bytes of one of them.
    """

    weights: dict[str, list[torch.Tensor]]
    nbytes: dict[str, int]


def measure_kernels(rounds: int) -> list[dict[str, Any]]:
    """Gweights/s of each shape, number of tokens and way, and GB/s of reading the same bytes."""
    before = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(before[1])})
    try:
        return [measure(*shape, rounds) for shape in SHAPES]
    finally:
        torch.set_num_threads(before[0])
        os.sched_setaffinity(0, before[1])


@torch.inference_mode()
def measure(rows: int, columns: int, rounds: int) -> dict[str, Any]:
    """The figures of one shape."""
    say(f"products of {rows} × {columns}")
    copies = make_copies(rows, columns)
    check(copies)
    return {
        "rows": rows,
        "columns": columns,
        "copies": len(copies.weights[PRUNED]),
        "bytes_a_weight": {way: size / rows / columns for way, size in copies.nbytes.items()},
        "gweights_per_second": {
            tokens: multiplied(copies, tokens, rounds) for tokens in (*FEW, MANY)
        },
        "reading_gb_per_second": read(copies, rounds),
    }


# --- the matrices --------------------------------------------------------------------------------


def make_copies(rows: int, columns: int) -> Copies:
    """Gaussian weights, and the same pruned."""
    patterns = gaussian(BF16, rows * columns, seed=0).reshape(rows, columns)
    whole = tensor_of_patterns(patterns).view(torch.bfloat16)
    pruned = tensor_of_patterns(prune_rows(patterns, BF16, RULE).weights).view(torch.bfloat16)
    planes = {
        PRUNED: pack_tensor("a weight", pruned, PackedBefore(transposed=False)),
        WHOLE: pack_rest(whole),
    }
    sizes = {BF16_LINEAR: whole.nbytes, FP16_LINEAR: whole.nbytes}
    weights: dict[str, list[torch.Tensor]] = {}
    for way, each in planes.items():
        if each is None:
            raise AssertionError("Gaussian weights get smaller")
        sizes[way] = each.buffer.nbytes
    count = -(-_CACHES // sizes[PRUNED])
    for way, each in planes.items():
        weights[way] = [packed_again(each) for _ in range(count)]
    weights[BF16_LINEAR] = [whole.clone() for _ in range(count)]
    weights[FP16_LINEAR] = [whole.half() for _ in range(count)]
    return Copies(weights, sizes)


def packed_again(planes: HeldPlanes) -> PackedWeight:
    """A weight with planes of its own."""
    copy = HeldPlanes(planes.buffer.clone(), planes.meta)
    _ = copy.held  # checked here, not in the first product
    return PackedWeight(Content.of(copy))


def check(copies: Copies) -> None:
    """Compare packed products with those in float64, within the bound of float32 sums.

    Raises:
        AssertionError: If one is further off.
    """
    for way in PRUNED, WHOLE:
        weight = copies.weights[way][0]
        exact = weight.unpacked().double()
        x = some_activations(max(FEW), weight.shape[1])
        found, sums = linear(x, weight).double(), x.double() @ exact.T
        unit = weight.shape[1] * 2.0**-24
        most = unit / (1 - unit) * (x.double().abs() @ exact.abs().T) + sums.abs() * 2.0**-8
        if bool(((found - sums).abs() > most).any()):
            raise AssertionError(f"{way}: a product is further off than its bound")


def some_activations(tokens: int, columns: int) -> torch.Tensor:
    """Activations of some tokens, bfloat16 [tokens, columns]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, columns, generator=generator).bfloat16()


# --- the clock -----------------------------------------------------------------------------------


def multiplied(copies: Copies, tokens: int, rounds: int) -> dict[str, float]:
    """Gweights/s of each way to multiply by all copies; a weight counts once for all tokens."""
    first = copies.weights[BF16_LINEAR][0]
    x = some_activations(tokens, first.shape[1])
    given = {way: x.half() if way == FP16_LINEAR else x for way in WAYS}
    actions: dict[str, Callable[[int], object]] = {
        way: lambda i, way=way: linear(given[way], copies.weights[way][i])
        for way in WAYS
        if (tokens, way) != (MANY, FP16_LINEAR)  # takes seconds without instructions for it
    }
    count = max(1, len(copies.weights[PRUNED]) // tokens)
    best = best_seconds(actions, count, rounds)
    return {way: count * first.numel() / GB / seconds for way, seconds in best.items()}


def read(copies: Copies, rounds: int) -> dict[str, float]:
    """GB/s at which so many bytes as the copies of each way have are read, and only added up."""
    memory = torch.cat([dense.view(-1) for dense in copies.weights[BF16_LINEAR]]).view(torch.int64)
    count = len(copies.weights[PRUNED])
    parts = {way: memory[: count * copies.nbytes[way] // 8] for way in (PRUNED, WHOLE, BF16_LINEAR)}
    sums: dict[str, Callable[[int], object]] = {
        way: lambda _, part=part: part.sum() for way, part in parts.items()
    }
    best = best_seconds(sums, 1, rounds)
    return {way: parts[way].nbytes / GB / seconds for way, seconds in best.items()}


def best_seconds(
    actions: dict[str, Callable[[int], object]], count: int, rounds: int
) -> dict[str, float]:
    """The shortest of some passes over `count` copies, of each way in turn."""
    best = dict.fromkeys(actions, float("inf"))
    for number in range(rounds + 1):
        for way, action in actions.items():
            start = time.perf_counter()
            for i in range(count):
                action(i)
            if number:  # the first pass warms up
                best[way] = min(best[way], time.perf_counter() - start)
    return best


# --- the result ----------------------------------------------------------------------------------


def print_kernels(cases: list[dict[str, Any]]) -> None:
    """Prints the rates, and below which bandwidth packed weights win."""
    print(
        f"products alone, one core, bf16: packed weights, pruned at β = {RULE.beta:g} or without "
        "loss, and torch's linear;\nGweights/s, each weight counted once for all tokens\n"
    )
    rows = [["", "tokens", *WAYS, "pruned ÷ bf16", "÷ fp16"]]
    for case in cases:
        for tokens, rates in case["gweights_per_second"].items():
            cells = [f"{rates[way]:.2f}" if way in rates else "" for way in WAYS]
            ratios = [
                f"{rates[PRUNED] / rates[way]:.2f}" if way in rates else ""
                for way in (BF16_LINEAR, FP16_LINEAR)
            ]
            rows.append([_shape(case), str(tokens), *cells, *ratios])
    print_table(rows)
    print(
        f"\ntarget for one token: pruned ≥ {TARGET:g}, and ÷ bf16 ≥ 1.00\n\n"
        "bytes a weight; GB/s of reading as many bytes, and Gweights/s that this would allow\n"
    )
    ways = (PRUNED, WHOLE, BF16_LINEAR)
    rows = [["", *(cell for way in ways for cell in (way, "GB/s", "allows"))]]
    rows += [
        [_shape(case), *(cell for way in ways for cell in _reading(case, way))] for case in cases
    ]
    print_table(rows)
    print(
        "\nA core that reads B GB/s multiplies by at most B / 2 G dense bf16 weights a second. "
        "Packed ones\nof b bytes each allow B / b, and at most P, the rate above for one token. As "
        "b is less than 2,\nthey win where a core has less than 2 · P GB/s for itself:\n"
    )
    rows = [["GB/s a core", PRUNED, WHOLE]]
    rows += [[_shape(case), *(f"{2 * _rate(case, way):.1f}" for way in ways[:2])] for case in cases]
    print_table(rows)


def _shape(case: dict[str, Any]) -> str:
    return f"{case['rows']} × {case['columns']}"


def _rate(case: dict[str, Any], way: str) -> float:
    rate: float = case["gweights_per_second"][FEW[0]][way]
    return rate


def _reading(case: dict[str, Any], way: str) -> list[str]:
    size, speed = case["bytes_a_weight"][way], case["reading_gb_per_second"][way]
    return [f"{size:.3f}", f"{speed:.1f}", f"{speed / size:.1f}"]
