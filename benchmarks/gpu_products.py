"""For `bench_gpu.py`: products from packed rows beside torch's with dense ones, proven right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from common import spread
from emp_kernels.dispatch import pack_whole
from emp_kernels.gpu.pack import pack
from emp_kernels.gpu.prune import prune
from emp_kernels.gpu_arguments import MOST_TOKENS
from emp_kernels.gpu_held import hold_rows_there, multiply_rows_there, unpack_rows_there
from emp_kernels.gpu_held_whole import hold_whole_there, multiply_whole_there, unpack_whole_there
from emp_kernels.numbers import patterns_of_tensor
from kernel_basics import RULE
from torch.nn.functional import linear

from emp_llm.tensors.code_choice import choose_code, record_rows
from emp_llm.tensors.geometry import WholeGeometry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from emp_kernels.gpu_held import DeviceHeldRows
    from emp_kernels.gpu_held_whole import DeviceHeldWhole
    from gpu_kernels import Case, Clock

__all__ = ["measure_products"]

ROUNDING = 0.02
"""Of the largest output: more than sums in another order can differ, far less than a wrong weight
makes."""

SAMPLED_ROWS = 64
"""That the code of whole records is chosen by."""


@dataclass(frozen=True)
class Packed:
    """Sets of weights, packed and dense.

    Attributes:
        records: "pruned", or "whole" if all weights are kept.
        held: Each set, packed.
        dense: Each set, dense.
        multiply: Multiplies few tokens by a packed set.
        unpack: Unpacks a set.
    """

    records: str
    held: Sequence[DeviceHeldRows | DeviceHeldWhole]
    dense: list[torch.Tensor]
    multiply: Callable[[Any, torch.Tensor, torch.Tensor], None]
    unpack: Callable[[Any, torch.Tensor], None]


def measure_products(case: Case, tokens: Sequence[int], clock: Clock) -> list[dict[str, Any]]:
    """Time products with all sets of weights, for each number of tokens.

    Few tokens are multiplied with packed weights as they are. For more, each set is unpacked to one
    buffer, and torch multiplies that.
    """
    results = _measure(_pruned(case), tokens, clock)
    whole = _whole(case)
    return results if whole is None else results + _measure(whole, tokens, clock)


def _pruned(case: Case) -> Packed:
    """All sets, pruned."""
    workspace, number_format = case.workspace, case.number_format
    case.restore()
    held, dense = [], []
    for weights in case.outputs:
        packed = pack(weights, case.layout, RULE, workspace=workspace)
        prune(weights, number_format, RULE, out=weights, workspace=workspace)
        workspace.wait()
        held.append(hold_rows_there(packed.payload.clone(), packed.table, case.layout))
        dense.append(weights.view(number_format.torch_dtype))
    return Packed("pruned", held, dense, multiply_rows_there, unpack_rows_there)


def _whole(case: Case) -> Packed | None:
    """As many times the first set, not pruned; None if it would not get smaller."""
    number_format, (rows, columns) = case.number_format, case.inputs[0].shape
    geometry = WholeGeometry(
        number_format=number_format, shape=(rows, columns), record_rows=record_rows(columns)
    )
    weights = patterns_of_tensor(case.inputs[0].view(number_format.torch_dtype).cpu())
    layout = choose_code(weights[:SAMPLED_ROWS], geometry)
    if layout is None:
        return None
    packed = pack_whole(weights, layout)
    payload = torch.from_numpy(packed.payload).to(case.inputs[0].device)
    held = [
        hold_whole_there(payload.clone(), packed.lengths, layout, rows, columns)
        for _ in case.inputs
    ]
    dense = [each.view(number_format.torch_dtype) for each in case.inputs]
    return Packed("whole", held, dense, multiply_whole_there, unpack_whole_there)


def _measure(packed: Packed, tokens: Sequence[int], clock: Clock) -> list[dict[str, Any]]:
    held, dense = packed.held, packed.dense
    buffer = torch.empty_like(dense[0])

    def unpacked(each: DeviceHeldRows | DeviceHeldWhole) -> torch.Tensor:
        packed.unpack(each, buffer)
        return buffer

    results = []
    for count in tokens:
        x = torch.randn(count, buffer.shape[1], device=buffer.device).to(buffer.dtype)
        out = torch.empty(count, len(buffer), dtype=x.dtype, device=x.device)

        def multiply(
            each: DeviceHeldRows | DeviceHeldWhole,
            x: torch.Tensor = x,
            out: torch.Tensor = out,
        ) -> torch.Tensor:
            if len(x) > MOST_TOKENS:
                return linear(x, unpacked(each))
            packed.multiply(each, x, out)
            return out

        _agree(multiply(held[0]), linear(x, dense[0]))
        seconds = {
            "packed": clock.seconds(lambda do=multiply: [do(each) for each in held]),
            "dense": clock.seconds(lambda x=x: [linear(x, each) for each in dense]),
        }
        results.append(
            {
                "records": packed.records,
                "tokens": count,
                "packed_ratio": held[0].records.nbytes / dense[0].nbytes,
                "weights": len(dense) * dense[0].numel(),
                "seconds": {name: spread(each) for name, each in seconds.items()},
            }
        )
    return results


def _agree(found: torch.Tensor, expected: torch.Tensor) -> None:
    """End here where products are wrong: their speed means nothing then.

    Raises:
        AssertionError: If the two differ by more than rounding.
    """
    wide = expected.double()
    if not bool(((found.double() - wide).abs() <= ROUNDING * wide.abs().max()).all()):
        raise AssertionError("products from packed weights differ from those of dense ones")
