"""How many weights the controls leave to each group, and which: worked out by hand or naively."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.architectures import save_tiny_model
from support.checkpoints import bits, load
from transformers import AutoModelForCausalLM

from emp_llm import effective_number
from emp_llm.checkpoint.checkpoint import open_checkpoint
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.comparison.allocation import apportion, spread
from emp_llm.comparison.choices import Choices
from emp_llm.comparison.control_model import ChoiceConfig
from emp_llm.comparison.pq_index import power_sums, retained_bound
from emp_llm.selection.ranking import keep_largest, random_keys
from emp_llm.structure.targets import decide_targets
from emp_llm.tensors.target import Target

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=20)


def counts(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


# --- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "sizes", "expected"),
    [
        (0, [4, 4], [0, 0]),
        (8, [4, 4], [4, 4]),
        (5, [4, 4, 4], [1, 2, 2]),  # up to the groups' ends: 5/3, 10/3, 5
        (6, [4, 8, 12], [1, 2, 3]),
        (1, [1, 1, 1], [0, 0, 1]),
    ],
)
def test_spread_gives_each_group_the_same_share(
    total: int, sizes: list[int], expected: list[int]
) -> None:
    assert spread(total, counts(*sizes)).tolist() == expected


@given(SIZES, st.floats(0, 1))
def test_spread_rounds_each_share_up_or_down_and_misses_no_weight(
    sizes: list[int], share: float
) -> None:
    total = round(share * sum(sizes))
    found = spread(total, counts(*sizes)).tolist()
    assert sum(found) == total
    for count, size in zip(found, sizes, strict=True):
        quota = Fraction(total * size, sum(sizes))
        assert math.floor(quota) <= count <= math.ceil(quota)


def test_spread_counts_the_weights_of_the_largest_models() -> None:
    sizes = np.full(3, 3 << 40, np.int64)
    total = (3 << 41) + 1
    assert spread(total, sizes).tolist() == [2 << 40, 2 << 40, (2 << 40) + 1]


@pytest.mark.parametrize(
    ("total", "shares", "sizes", "expected"),
    [
        (6, [1.0, 2.0, 3.0], [9, 9, 9], [1, 2, 3]),
        (12, [1.0, 2.0, 3.0], [9, 9, 9], [2, 4, 6]),
        (7, [1.0, 2.0, 6.0], [4, 4, 4], [1, 2, 4]),  # the last one is full, c = 1
        (5, [0.01, 2.0, 2.0], [9, 9, 9], [1, 2, 2]),  # the first one keeps one at least
        (4, [0.0, 2.0, 2.0], [9, 9, 9], [0, 2, 2]),
        (5, [2.0, 2.0, 2.0], [9, 9, 9], [2, 2, 1]),  # 5/3 each: the first ones get what is left
        (7, [1.0, 2.9, 1.0], [9, 9, 9], [2, 4, 1]),  # c = 10/7: 1.43, 4.14, 1.43
        (27, [1.0, 2.0, 3.0], [9, 9, 9], [9, 9, 9]),
        (0, [0.0, 0.0], [4, 4], [0, 0]),
    ],
)
def test_apportion_multiplies_all_shares_by_one_factor(
    total: int, shares: list[float], sizes: list[int], expected: list[int]
) -> None:
    assert apportion(total, np.array(shares), counts(*sizes)).tolist() == expected


@given(st.data(), SIZES)
def test_apportion_is_within_one_weight_of_one_factor(
    data: st.DataObject, sizes: list[int]
) -> None:
    shares = [data.draw(st.floats(0.5, size + 0.5)) for size in sizes]
    total = data.draw(st.integers(len(sizes), sum(sizes)))
    found = apportion(total, np.array(shares), counts(*sizes)).tolist()
    assert sum(found) == total
    assert all(1 <= count <= size for count, size in zip(found, sizes, strict=True))
    # a factor c fits a count k if k - 1 < c · share < k + 1, where the ends are no limits
    parts = list(zip(found, shares, sizes, strict=True))
    least = max(((k - 1) / share for k, share, _ in parts), default=0)
    most = min(((k + 1) / share for k, share, size in parts if k < size), default=math.inf)
    assert least <= most


@pytest.mark.parametrize("total", [1, 9])
def test_apportion_refuses_what_groups_with_a_share_cannot_keep(total: int) -> None:
    with pytest.raises(ValueError, match=f"2 to 8 weights can be kept, not {total}"):
        apportion(total, np.array([1.0, 0.0, 1.0]), counts(4, 4, 4))


# --- the PQ index --------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (1.0, 2.0), (0.3, 1.7)])
def test_the_bound_is_the_one_that_the_paper_states(p: float, q: float) -> None:
    weights = np.abs(np.random.default_rng(0).standard_normal(40))
    d = weights.size
    norm_p, norm_q = ((weights**e).sum() ** (1 / e) for e in (p, q))
    index = 1 - d ** (1 / q - 1 / p) * norm_p / norm_q
    stated = d * (1 - index) ** (p * q / (q - p))
    found = retained_bound(np.array([(weights**p).sum()]), np.array([(weights**q).sum()]), p=p, q=q)
    assert found[0] == pytest.approx(stated, rel=1e-12)


def test_with_p_1_and_q_2_the_bound_is_the_effective_number() -> None:
    weights = torch.randn(5, 30, generator=torch.Generator().manual_seed(0)).abs().double()
    found = retained_bound(weights.sum(1).numpy(), weights.square().sum(1).numpy(), p=1, q=2)
    np.testing.assert_allclose(found, effective_number(weights).numpy(), rtol=1e-12)


def test_the_papers_bound_is_the_effective_number_of_square_roots() -> None:
    weights = torch.tensor([[4.0, 1.0, 1.0, 0.0]])
    # (2 + 1 + 1)² / 6
    found = retained_bound(np.array([4.0]), np.array([6.0]))
    assert found[0] == pytest.approx(16 / 6)
    assert found[0] == pytest.approx(effective_number(weights.sqrt()).item())


def test_of_gaussian_weights_the_bound_says_84_7_percent() -> None:
    weights = np.abs(np.random.default_rng(0).standard_normal(1_000_000))
    found = retained_bound(np.array([np.sqrt(weights).sum()]), np.array([weights.sum()]))
    # E√|x| = 2^(1/4) Γ(3/4) / √π, E|x| = √(2/π)
    exact = (2**0.25 * math.gamma(0.75)) ** 2 / math.pi / math.sqrt(2 / math.pi)
    assert exact == pytest.approx(0.847, abs=5e-4)
    assert found[0] / weights.size == pytest.approx(exact, rel=1e-3)


def test_rows_of_zeros_keep_nothing() -> None:
    found = retained_bound(np.array([0.0, 3.0]), np.array([0.0, 3.0]))
    assert found.tolist() == [0, pytest.approx(3)]


# --- which ones ----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_the_largest_are_kept_and_of_equal_ones_the_first(
    keys: list[int], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, len(keys)))
    order = sorted(range(len(keys)), key=lambda i: (-keys[i], i))
    expected = [i in order[:count] for i in range(len(keys))]
    assert keep_largest(np.array(keys, np.uint16), count).tolist() == expected


def test_random_keys_depend_on_each_argument_and_on_nothing_else() -> None:
    first = random_keys(1, "a", 2, 50)
    np.random.default_rng(0).random(9)
    assert (random_keys(1, "a", 2, 50) == first).all()
    for other in (
        random_keys(0, "a", 2, 50),
        random_keys(1, "b", 2, 50),
        random_keys(1, "a", 3, 50),
    ):
        assert (other != first).any()


# --- loaded models -------------------------------------------------------------------------------


def targets_of(folder: Path) -> list[Target]:
    tensors = open_checkpoint(folder).tensors
    described = {name: (entry.dtype, entry.shape) for name, (_, entry) in tensors.items()}
    decisions = decide_targets(folder, described)
    return [
        Target.of(*tensors[name], transposed=decision.transposed)
        for name, decision in decisions.items()
        if decision.prune
    ]


def matrices(folder: Path) -> dict[tuple[str, int], torch.Tensor]:
    """The targets' matrices of a checkpoint, rows along the last dimension, in order."""
    stored = load(folder)
    found = {}
    for target in sorted(targets_of(folder), key=lambda t: t.name):
        stack = stored[target.name].mT if target.geometry.transposed else stored[target.name]
        for number, matrix in enumerate(stack.reshape(-1, *stack.shape[-2:])):
            found[target.name, number] = matrix
    return found


def naive(rows: list[torch.Tensor], kept: int) -> list[torch.Tensor]:
    """The same share of each group's largest, group by group and weight by weight."""
    total, before, result = sum(row.numel() for row in rows), 0, []
    for row in rows:
        flat = row.double().abs().flatten().tolist()
        up_to = before + len(flat)
        count = kept * up_to // total - kept * before // total
        order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:count]
        mask = torch.zeros(len(flat), dtype=torch.bool)
        mask[order] = True
        result.append(torch.where(mask.reshape(row.shape), row, torch.zeros_like(row)))
        before = up_to
    return result


def loaded(folder: Path, tmp_path: Path, control: str, kept: int, seed: int | None = None) -> dict:
    """The matrices of a model that was pruned as a control does, by way of a dense checkpoint."""
    with OpenFiles() as files:
        choice = Choices(targets_of(folder), files, threads=2).choose(control, kept, seed)
    assert sum(int(part.sum()) for part in choice.counts.values()) == kept
    config = ChoiceConfig(choice, targets="mlp", ignore=())
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert model.config.quantization_config.quant_method == "emp"
    stored = tmp_path / f"{control} {seed}"
    dense = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            parameter.copy_(model.get_parameter(name))
    dense.save_pretrained(stored)
    others = {n: t for n, t in load(stored).items() if n not in choice.counts}
    assert {n: bits(t) for n, t in others.items()} == {n: bits(load(folder)[n]) for n in others}
    return matrices(stored)


ARCHITECTURES = ("llama", "gpt2", "qwen3-moe", "mixtral", "gpt-oss")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("share", [0.4, 0.637])
def test_uniform_rows_keep_the_largest_of_each(folder: Path, tmp_path: Path, share: float) -> None:
    dense = matrices(folder)
    kept = round(share * sum(matrix.numel() for matrix in dense.values()))
    rows = [row for matrix in dense.values() for row in matrix]
    found = loaded(folder, tmp_path, "magnitude-row", kept)
    assert torch.equal(
        torch.cat([matrix.flatten() for matrix in found.values()]), torch.cat(naive(rows, kept))
    )


def test_uniform_layers_keep_the_largest_of_each(folder: Path, tmp_path: Path) -> None:
    dense = matrices(folder)
    kept = round(0.637 * sum(matrix.numel() for matrix in dense.values()))
    expected = naive(list(dense.values()), kept)
    found = loaded(folder, tmp_path, "magnitude-layer", kept)
    assert all(map(torch.equal, found.values(), expected))


def test_the_pq_index_says_how_many_of_a_rows_largest_stay(folder: Path, tmp_path: Path) -> None:
    dense = matrices(folder)
    rows = [row.double().abs() for matrix in dense.values() for row in matrix]
    kept = round(0.6 * sum(row.numel() for row in rows))
    shares = [(row.sqrt().sum() ** 2 / row.sum()).item() for row in rows]
    found = [row for m in loaded(folder, tmp_path, "pq-index", kept).values() for row in m]
    expected = apportion(kept, np.array(shares), counts(*map(len, rows)))
    assert len(set(expected.tolist())) > 1
    for row, left, count in zip(rows, found, expected, strict=True):
        assert int((left != 0).sum()) == count
        stays = sorted(range(len(row)), key=lambda i: (-row[i].item(), i))[:count]
        assert set(torch.nonzero(left).flatten().tolist()) == set(stays)


def test_random_keeps_the_same_share_of_each_row(folder: Path, tmp_path: Path) -> None:
    dense = matrices(folder)
    kept = round(0.5 * sum(matrix.numel() for matrix in dense.values()))
    rows = [row for matrix in dense.values() for row in matrix]
    expected = [int((row != 0).sum()) for row in naive(rows, kept)]
    first = [row for m in loaded(folder, tmp_path, "random", kept, 0).values() for row in m]
    second = [row for m in loaded(folder, tmp_path, "random", kept, 1).values() for row in m]
    assert [int((row != 0).sum()) for row in first] == expected
    assert all(
        torch.equal(left[left != 0], row[left != 0]) for left, row in zip(first, rows, strict=True)
    )
    assert not all(map(torch.equal, first, second))
    # half of the weights are kept at random: about half of the largest half are among them
    hits = sum(
        int((left[row.abs().argsort(descending=True)[: len(row) // 2]] != 0).sum())
        for left, row in zip(first, rows, strict=True)
    )
    assert 0.4 < hits / sum(len(row) // 2 for row in rows) < 0.6


def test_the_sums_are_those_of_each_row(folder: Path) -> None:
    targets = targets_of(folder)
    with OpenFiles() as files:
        sums = power_sums(targets, files, threads=2)
    rows = [row.double().abs() for matrix in matrices(folder).values() for row in matrix]
    names = sorted(sums)
    np.testing.assert_allclose(
        np.concatenate([sums[name][0] for name in names]), [row.sqrt().sum().item() for row in rows]
    )
    np.testing.assert_allclose(
        np.concatenate([sums[name][1] for name in names]), [row.sum().item() for row in rows]
    )
