"""For `bench_gpu.py`: products from packed rows beside torch's with dense ones, proven right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from common import spread
from emp_kernels.gpu.pack import pack
from emp_kernels.gpu.prune import prune
from emp_kernels.gpu_arguments import MOST_TOKENS
from emp_kernels.gpu_held import (
    DeviceHeldRows,
    hold_rows_there,
    multiply_rows_there,
    unpack_rows_there,
)
from kernel_basics import RULE
from torch.nn.functional import linear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpu_kernels import Case, Clock

__all__ = ["measure_products"]

ROUNDING = 0.02
"""Of the largest output: more than sums in another order can differ, far less than a wrong weight
makes."""


def measure_products(case: Case, tokens: Sequence[int], clock: Clock) -> list[dict[str, Any]]:
    """Time products with all sets of weights, for each number of tokens.

    Few tokens are multiplied with packed weights as they are. For more, each set is unpacked to one
    buffer, and torch multiplies that.
    """
    workspace, number_format = case.workspace, case.number_format
    case.restore()
    held, dense = [], []
    for weights in case.outputs:
        packed = pack(weights, case.layout, RULE, workspace=workspace)
        prune(weights, number_format, RULE, out=weights, workspace=workspace)
        workspace.wait()
        held.append(hold_rows_there(packed.payload.clone(), packed.table, case.layout))
        dense.append(weights.view(number_format.torch_dtype))
    buffer = torch.empty_like(dense[0])

    def unpacked(each: DeviceHeldRows) -> torch.Tensor:
        unpack_rows_there(each, buffer)
        return buffer

    results = []
    for count in tokens:
        x = torch.randn(count, case.shape[-1], device=buffer.device).to(buffer.dtype)
        out = torch.empty(count, len(buffer), dtype=x.dtype, device=x.device)

        def multiply(
            each: DeviceHeldRows, x: torch.Tensor = x, out: torch.Tensor = out
        ) -> torch.Tensor:
            if len(x) > MOST_TOKENS:
                return linear(x, unpacked(each))
            multiply_rows_there(each, x, out)
            return out

        _agree(multiply(held[0]), linear(x, dense[0]))
        seconds = {
            "packed": clock.seconds(lambda do=multiply: [do(each) for each in held]),
            "dense": clock.seconds(lambda x=x: [linear(x, each) for each in dense]),
        }
        results.append(
            {
                "tokens": count,
                "packed_ratio": held[0].records.nbytes / dense[0].nbytes,
                "weights": case.nbytes // number_format.item_bytes,
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
