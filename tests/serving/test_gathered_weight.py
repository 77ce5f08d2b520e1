"""A weight that is filled part by part, as servers fill merged and divided weights."""

import pytest
import torch
from support.checkpoints import bits, gaussian
from torch import Tensor, nn

from emp_llm.resident.content import Content
from emp_llm.resident.packing import PackedBefore, pack_tensor
from emp_llm.resident.weight import PackedWeight
from emp_llm.serving.gathered_weight import GatheredWeight

BF16 = torch.bfloat16


def pruned(rows: int, columns: int, seed: int) -> Tensor:
    weights = gaussian(rows, columns, seed=seed)
    return torch.where(weights.abs() < 0.3, 0, weights)


def packed(dense: Tensor) -> PackedWeight:
    return PackedWeight(Content.of(pack_tensor("w", dense, PackedBefore(transposed=False))))


def parameter(rows: int, columns: int, dtype: torch.dtype = BF16) -> nn.Parameter:
    return nn.Parameter(GatheredWeight(rows, columns, dtype), requires_grad=False)


def whole(weight: nn.Parameter) -> Tensor:
    assert isinstance(weight, GatheredWeight)
    return weight.whole()


def dense_of(weight: nn.Parameter) -> Tensor:
    made = whole(weight)
    assert isinstance(made, PackedWeight)
    return made.unpacked()


def test_merged_matrices_stay_packed_whichever_comes_first() -> None:
    queries, keys, values = pruned(6, 64, 0), pruned(2, 64, 1), pruned(2, 64, 2)
    weight = parameter(10, 64)

    weight.data.narrow(0, 8, 2).copy_(packed(values))
    weight.data.narrow(0, 0, 6).copy_(packed(queries))
    weight[6:8].data.copy_(packed(keys))

    assert bits(dense_of(weight)) == bits(torch.cat([queries, keys, values]))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_takes_its_rows_of_each_matrix(rank: int) -> None:
    gate, up = pruned(8, 64, 0), pruned(8, 64, 1)
    weight = parameter(8, 64)

    for place, matrix in ((0, gate), (4, up)):
        weight.data.narrow(0, place, 4).copy_(packed(matrix).narrow(0, 4 * rank, 4))

    own = slice(4 * rank, 4 * rank + 4)
    assert bits(dense_of(weight)) == bits(torch.cat([gate[own], up[own]]))


def test_a_rank_that_is_alone_takes_all_columns_packed() -> None:
    matrix = pruned(8, 64, 0)
    weight = parameter(8, 64)

    weight.data.copy_(packed(matrix).narrow(1, 0, 64))

    assert bits(dense_of(weight)) == bits(matrix)


@pytest.mark.parametrize("rank", [0, 1])
def test_columns_of_a_rank_are_dense(rank: int) -> None:
    matrix = pruned(8, 64, 0)
    weight = parameter(8, 32)

    weight.data.copy_(packed(matrix).narrow(1, 32 * rank, 32))

    made = whole(weight)
    assert type(made) is torch.Tensor
    assert bits(made) == bits(matrix[:, 32 * rank : 32 * rank + 32].contiguous())


def test_dense_rows_among_packed_ones_are_packed() -> None:
    words, added = pruned(5, 64, 0), gaussian(2, 64, seed=1)
    weight = parameter(8, 64)

    weight[:5].data.copy_(packed(words))
    weight[5:].data.fill_(0)
    weight.data[6:8].copy_(added)

    padding = torch.zeros(1, 64, dtype=BF16)
    assert bits(dense_of(weight)) == bits(torch.cat([words, padding, added]))


def test_a_weight_with_nothing_packed_is_dense() -> None:
    matrix = gaussian(8, 64)
    weight = parameter(8, 64)

    weight.data[:, :32] = matrix[:, :32]  # as a loader of its own kind may do
    weight.data[:, 32:] = matrix[:, 32:]

    assert type(whole(weight)) is torch.Tensor
    assert bits(whole(weight)) == bits(matrix)


def test_rows_that_are_filled_again_are_those_of_the_last_time() -> None:
    first, second, third = pruned(8, 64, 0), pruned(8, 64, 1), gaussian(3, 64, seed=2)
    weight = parameter(8, 64)

    weight.data.copy_(packed(first))
    weight.data.copy_(packed(second))
    assert bits(dense_of(weight)) == bits(second)

    weight.data.narrow(0, 2, 3).copy_(third)  # the packed rows around it become dense
    assert bits(whole(weight)) == bits(torch.cat([second[:2], third, second[5:]]))


def test_what_cannot_be_packed_makes_all_dense() -> None:
    matrix, odd = pruned(4, 64, 0), torch.full((1, 64), torch.nan, dtype=BF16)
    weight = parameter(5, 64)

    weight.data[:4].copy_(packed(matrix))
    weight.data[4:].copy_(odd)

    assert bits(whole(weight)) == bits(torch.cat([matrix, odd]))


def test_parts_of_another_dtype_are_cast() -> None:
    matrix = pruned(4, 64, 0)
    weight = parameter(4, 64, torch.float16)

    weight.data.copy_(packed(matrix))

    assert bits(dense_of(weight)) == bits(matrix.half())


def test_other_operators_see_what_was_filled() -> None:
    matrix = pruned(4, 64, 0)
    weight = parameter(4, 64)
    weight.data.copy_(packed(matrix))

    twin = weight.data.to("meta")
    assert twin.is_meta
    assert twin.shape == weight.shape == (4, 64)
    assert whole(weight).shape == (4, 64)
    assert torch.equal(weight.float().sum(0), matrix.float().sum(0))
