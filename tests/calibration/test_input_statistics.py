"""What a matrix is multiplied by, however the product is taken."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from emp_llm.calibration.hessian import add_squares, mirror
from emp_llm.calibration.input_statistics import (
    AllObservedError,
    Gathering,
    ProductObserver,
    UnsharedInputsError,
    UntilAllObserved,
)
from emp_llm.calibration.statistics import Statistics

T, C, R = 5, 4, 6
ParameterMatrix = tuple[str, int]


def weight(*shape: int) -> nn.Parameter:
    """Any weights."""
    return nn.Parameter(torch.randn(*shape), requires_grad=False)


def seen_in(
    parameters: dict[str, nn.Parameter], run: Callable[[], object]
) -> list[tuple[ParameterMatrix, torch.Tensor]]:
    """The matrices that something multiplies by, and their inputs."""
    found: list[tuple[ParameterMatrix, torch.Tensor]] = []
    with (
        torch.no_grad(),
        ProductObserver(parameters, lambda matrix, x_TC: found.append((matrix, x_TC))),
    ):
        run()
    return found


def test_parts_of_one_tensor_are_told_apart() -> None:
    whole = torch.randn(3 * R, C)
    parts = {
        name: nn.Parameter(part, requires_grad=False)
        for name, part in zip("qkv", whole.chunk(3), strict=True)
    }
    x_TC = torch.randn(T, C)
    found = seen_in(parts, lambda: [linear(x_TC, part) for part in parts.values()])
    assert [matrix for matrix, _ in found] == [("q", 0), ("k", 0), ("v", 0)]


@pytest.mark.parametrize("shape", [(3, C, T), (2, 3, C, T)])
def test_all_inputs_of_a_batch_that_lies_apart_are_seen(shape: tuple[int, ...]) -> None:
    inputs = torch.randn(shape).mT  # torch multiplies these sample by sample
    w_RC = weight(R, C)
    found = seen_in({"w": w_RC}, lambda: linear(inputs, w_RC))
    assert {matrix for matrix, _ in found} == {("w", 0)}
    assert torch.equal(torch.cat([x_TC for _, x_TC in found]), inputs.reshape(-1, C))


def test_each_matrix_of_a_stack_sees_its_own_inputs() -> None:
    w_ECR, x_ETC = weight(3, C, R), torch.randn(3, T, C)

    def run() -> None:
        torch.bmm(x_ETC, w_ECR)
        torch.mm(x_ETC[2], w_ECR[1])

    found = seen_in({"w": w_ECR}, run)
    assert [matrix for matrix, _ in found] == [("w", 0), ("w", 1), ("w", 2), ("w", 1)]
    assert all(torch.equal(x, x_ETC[i]) for (_, x), i in zip(found, (0, 1, 2, 2), strict=True))


@contextmanager
def until_all_observed(gathering: Gathering, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Within this ``with`` statement, a sample is run as a calibration runs it."""
    until = UntilAllObserved(gathering.observe, gathering)
    observer = ProductObserver(parameters, until, until.needs)
    with torch.no_grad(), suppress(AllObservedError), observer:
        yield


def test_a_matrix_that_is_used_once_more_than_the_one_it_shares_with_parts_from_it() -> None:
    a_RC, b_RC = weight(R, C), weight(R, C)
    once_TC, more_TC = torch.randn(T, C), torch.randn(T, C)

    def gather(*, shared: bool) -> Gathering:
        gathering = Gathering({("a", 0), ("b", 0)}, {"norms"}, T, shared=shared)
        with torch.no_grad(), ProductObserver({"a": a_RC, "b": b_RC}, gathering.observe):
            linear(once_TC, a_RC)
            linear(once_TC, b_RC)
            linear(more_TC, a_RC)
        gathering.forget_last()
        return gathering

    with pytest.raises(UnsharedInputsError):
        gather(shared=True)
    gathering = gather(shared=False)
    for name, inputs in (("a", torch.cat([once_TC, more_TC])), ("b", once_TC)):
        found = gathering.statistics((name, 0), Statistics(tensor=name))
        assert found.tokens == len(inputs)
        assert found.norms_C is not None
        assert found.norms_C.tolist() == pytest.approx(inputs.double().norm(dim=0).tolist())


def test_a_sample_ends_at_the_last_product_that_is_observed_once_the_first_has_shown_it() -> None:
    a_RC, b_RC, computed = weight(R, C), weight(R, C), list[str]()
    gathering = Gathering({("a", 0)}, {"norms"}, T, shared=True)

    def run() -> None:
        for name, w_RC in (("a", a_RC), ("b", b_RC), ("a", a_RC), ("b", b_RC)):
            linear(torch.ones(T, C), w_RC)
            computed.append(name)

    gathering.begin()
    for _ in range(2):
        with until_all_observed(gathering, {"a": a_RC, "b": b_RC}):
            run()
        gathering.forget_last()

    assert computed == [*"abab", *"ab"]
    assert gathering.statistics(("a", 0), Statistics(tensor="a")).tokens == 4 * T


def test_a_product_is_left_out_where_all_that_is_still_observed_shares_its_inputs() -> None:
    a_RC, b_RC, x_TC = weight(R, C), weight(R, C), torch.randn(T, C)
    gathering = Gathering({("a", 0), ("b", 0)}, {"norms"}, T, shared=True)

    def products(inputs_of_b: torch.Tensor | None = None) -> list[torch.Tensor]:
        found = []
        with until_all_observed(gathering, {"a": a_RC, "b": b_RC}):
            found.append(linear(x_TC, a_RC))
            found.append(linear(x_TC if inputs_of_b is None else inputs_of_b, b_RC))
        return found

    gathering.begin()
    a_TR, b_TR = products()  # nothing is known of the first sample
    assert torch.equal(a_TR, x_TC @ a_RC.T)
    assert torch.equal(b_TR, x_TC @ b_RC.T)
    gathering.forget_last()
    (a_TR,) = products()
    assert torch.equal(a_TR, torch.zeros(T, R))
    gathering.forget_last()
    assert gathering.statistics(("b", 0), Statistics(tensor="b")).tokens == 2 * T
    # what does not share them after all may depend on the product
    with pytest.raises(UnsharedInputsError):
        products(inputs_of_b=torch.randn(T, C))


def test_a_product_is_computed_where_the_next_has_other_inputs() -> None:
    a_RC, b_RC, x_TC = weight(C, C), weight(R, C), torch.randn(T, C)
    gathering = Gathering({("a", 0), ("b", 0)}, {"norms"}, T, shared=True)
    gathering.begin()
    for _ in range(2):
        with until_all_observed(gathering, {"a": a_RC, "b": b_RC}):
            linear(linear(x_TC, a_RC), b_RC)
        gathering.forget_last()
    found = gathering.statistics(("b", 0), Statistics(tensor="b")).norms_C
    assert found is not None
    expected_C = (2 * (x_TC @ a_RC.T).double().square().sum(0)).sqrt()
    assert found.tolist() == pytest.approx(expected_C.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_gap_to_the_dense_inputs(dtype: torch.dtype) -> None:
    gathering = Gathering({("a", 0)}, {"hessian"}, T, shared=True)
    dense, own = ([torch.randint(-4, 5, (T, C)).to(dtype) for _ in range(2)] for _ in range(2))
    for dense_TC, x_TC in zip(dense, own, strict=True):
        gathering.observe_dense(("a", 0), dense_TC)
        gathering.observe(("a", 0), x_TC)
        gathering.forget_last()
    found = gathering.statistics(("a", 0), Statistics(tensor="a")).gap_CC
    expected_CC = sum(
        (d.double() - x.double()).T @ x.double() for d, x in zip(dense, own, strict=True)
    )
    assert found is not None
    assert found.dtype == torch.float32
    # whole numbers below 256 are exact in bfloat16
    assert torch.equal(found.double(), expected_CC)


def gap_of(*samples: tuple[torch.Tensor | None, torch.Tensor]) -> torch.Tensor | None:
    """Of one matrix beside another, from its dense inputs and its own, sample by sample."""
    gathering = Gathering({("a", 0), ("b", 0)}, {"hessian"}, T, shared=True)
    for dense_TC, x_TC in samples:
        if dense_TC is not None:
            gathering.observe_dense(("b", 0), dense_TC)
            if len(dense_TC):
                gathering.observe_dense(("a", 0), dense_TC)
        gathering.observe(("a", 0), x_TC)
        gathering.forget_last()
    return gathering.statistics(("a", 0), Statistics(tensor="a")).gap_CC


def test_the_gap_of_some_samples_stands_for_all() -> None:
    dense_TC, *own = (torch.randint(-4, 5, (T, C)).float() for _ in range(4))
    one_CC = (dense_TC - own[0]).T @ own[0]
    found_CC = gap_of((dense_TC, own[0]), (None, own[1]), (None, own[2]))
    assert found_CC is not None
    assert torch.equal(found_CC, 3 * one_CC)


def test_there_is_no_gap_if_some_of_the_dense_inputs_are_not_known() -> None:
    dense_TC, x_TC = (torch.randint(-4, 5, (T, C)).float() for _ in range(2))
    none_TC = torch.empty(0, C)
    assert gap_of((dense_TC, x_TC), (dense_TC[1:], x_TC[1:])) is None
    assert gap_of((none_TC, x_TC[1:]), (dense_TC, x_TC)) is None
    assert gap_of((dense_TC, x_TC), (None, x_TC[1:])) is None
    assert gap_of((None, x_TC)) is None


def test_a_sample_goes_to_its_end_where_the_first_has_not_come_to_all_matrices() -> None:
    gathering = Gathering({("a", 0), ("b", 0)}, {"norms"}, T, shared=True)
    gathering.begin()
    gathering.observe(("a", 0), torch.ones(T, C))
    gathering.forget_last()
    assert gathering.times_a_sample is None


@pytest.mark.parametrize("columns", [1, 255, 256, 257, 700, 2100])
def test_a_hessian_is_computed_in_parts_and_mirrored(columns: int) -> None:
    x_TC = torch.randint(-3, 4, (7, columns)).float()
    hessian_CC = torch.zeros(columns, columns)
    for some_TC in (x_TC[:3], x_TC[3:]):
        add_squares(hessian_CC, some_TC)
    mirror(hessian_CC)
    assert torch.equal(hessian_CC, x_TC.T @ x_TC)
