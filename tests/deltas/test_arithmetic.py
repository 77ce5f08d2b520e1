"""Differences and sums of bit patterns are those of torch, in float32 and rounded."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from emp_kernels.numbers import FORMATS, NumberFormat, patterns_of_tensor

from emp_llm.deltas.arithmetic import add, subtract

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
COUNT = (1 << 16) + 77
"""More than are worked on at a time."""


def weights(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Patterns of all kinds: any finite number, infinities, NaN, zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(1 << 31), 1 << 31, (COUNT,), generator=generator, dtype=torch.int64)
    integers = torch.int16 if dtype.itemsize == 2 else torch.int32
    some = (bits >> (32 - 8 * dtype.itemsize)).to(integers).view(dtype)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0, -1.0, 65504.0])
    return torch.cat([special.to(dtype), some, torch.randn(COUNT, generator=generator).to(dtype)])


@pytest.mark.parametrize(
    ("function", "expected"), [(subtract, torch.sub), (add, torch.add)], ids=["subtract", "add"]
)
@pytest.mark.parametrize("base_name", DTYPES)
@pytest.mark.parametrize("name", DTYPES)
def test_results_are_those_of_torch_to_the_bit(
    name: str,
    base_name: str,
    function: Callable[[np.ndarray, NumberFormat, np.ndarray, NumberFormat], None],
    expected: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    one, other = weights(DTYPES[name], 1), weights(DTYPES[base_name], 2).flip(0)
    right = expected(one.float(), other.float()).to(DTYPES[name])
    found = one.clone()
    function(
        patterns_of_tensor(found), FORMATS[name], patterns_of_tensor(other), FORMATS[base_name]
    )
    is_number = ~right.isnan()
    assert torch.equal(found.isnan(), right.isnan())
    integers = torch.int16 if right.itemsize == 2 else torch.int32
    assert torch.equal(found[is_number].view(integers), right[is_number].view(integers))
    assert is_number.sum() > COUNT
