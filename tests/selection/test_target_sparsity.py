"""`target_sparsity` finds the one β that leaves as many weights as were asked for."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from emp_kernels.numbers import F32
from support.arriving import SHARDS, weights
from support.checkpoints import (
    DOWN,
    GATE,
    UP,
    F,
    H,
    Tensors,
    few_values,
    files,
    gaussian,
    llama_config,
    load,
    mlp,
    pruned_by_rule,
    write_checkpoint,
)
from support.hub_server import HubServer
from support.processes import start

from emp_llm import OptionError, PruneOptions, inspect, prune, unpack
from emp_llm.output.output_folder import STAGING_NAME
from emp_llm.runtime.team import Team
from emp_llm.selection import group_numbers as group_numbers_module
from emp_llm.selection.group_numbers import GroupNumbers
from emp_llm.selection.target_sparsity import beta_for_sparsity, shortest_decimal

TinyModel = Callable[..., Path]

GRANULARITIES = ("row", "layer", "model")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def steps_of(groups: Sequence[np.ndarray]) -> list[Fraction]:
    """Every β at which one of some groups of scores keeps one weight more, in exact fractions."""
    betas = []
    for group in groups:
        scores = [Fraction(score) for score in group.ravel().tolist()]
        s1, s2 = sum(scores), sum(score * score for score in scores)
        if s2:
            slack = Fraction(1.0 + 1e-9)
            betas += [k * s2 / (slack * s1 * s1) for k in range(2, len(scores) + 1)]
    return sorted(betas)


def kept_at(groups: Sequence[np.ndarray], beta: float) -> int:
    """How many weights some groups keep, in exact fractions."""
    live = sum(bool(group.any()) for group in groups)
    return live + sum(step <= Fraction(beta) for step in steps_of(groups))


def found_beta(groups: Sequence[np.ndarray], sparsity: float, threads: int = 1) -> float:
    """What is found for rows of scores, float32 [R, C] each."""
    with GroupNumbers() as numbers:
        for rows in groups:
            patterns = rows.astype(np.float32).view(np.uint32)
            numbers.begin_rows(rows.shape[1], F32, patterns.__getitem__)
            scores = rows.astype(np.float64)
            numbers.add_rows(np.column_stack([scores.sum(axis=1), (scores**2).sum(axis=1)]))
        weights = sum(rows.size for rows in groups)
        return beta_for_sparsity(numbers, weights, sparsity, threads=threads, team=Team())


def groups_of(tensors: Tensors, granularity: str) -> list[np.ndarray]:
    parts = [tensor.double().abs().numpy() for tensor in tensors.values()]
    if granularity == "model":
        return [np.concatenate([part.ravel() for part in parts])]
    return parts if granularity == "layer" else [row for part in parts for row in part]


def fewest_digits(low: Fraction, high: Fraction) -> int:
    """Digits of the shortest decimal number from low to below high, by trying one after another."""
    for digits, exponent in product(range(1, 18), range(-4, 4)):
        unit = Fraction(10) ** (exponent - digits + 1)
        number = -(-low // unit)
        if 10 ** (digits - 1) <= number <= 10**digits and number * unit < high:
            return digits
    raise AssertionError


def digits_of(beta: float) -> int:
    return len(repr(beta).replace(".", "").strip("0"))


@pytest.mark.parametrize(
    ("granularity", "dtype", "sparsity"),
    [
        (granularity, dtype, sparsity)
        for (granularity, dtype), sparsity in zip(
            product(GRANULARITIES, DTYPES), (0.03, *(0.5, 0.3, 0.7, 0.2) * 2), strict=True
        )
    ],
    ids=str,
)
def test_as_many_weights_are_left_as_were_asked_for_by_the_shortest_beta_that_does(
    tmp_path: Path, granularity: str, dtype: torch.dtype, sparsity: float
) -> None:
    tensors = mlp(H, F, dtype)
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), tensors)
    options = PruneOptions(granularity=granularity, target_sparsity=sparsity)
    report = prune(source, tmp_path / "out", options)
    groups, beta = groups_of(tensors, granularity), report["rule"]["beta"]
    weights = 3 * H * F
    wanted = round(weights - weights * sparsity)
    kept = report["totals"]["targets"]["kept"]
    assert kept == wanted == kept_at(groups, beta)
    unpack(tmp_path / "out", tmp_path / "dense")
    left = pruned_by_rule(tensors, list(tensors), beta=beta, granularity=granularity)
    assert sum(int((tensor != 0).sum()) for tensor in left.values()) == wanted
    assert load(tmp_path / "dense").keys() == tensors.keys()
    ends = [Fraction(0), *steps_of(groups)]
    live = kept_at(groups, 1e-300)
    assert digits_of(beta) == fewest_digits(*ends[wanted - live : wanted - live + 2])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_beta_that_was_found_gives_the_same_files(tmp_path: Path, granularity: str) -> None:
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), mlp(H, F))
    options = PruneOptions(granularity=granularity, target_sparsity=0.4)
    found = prune(source, tmp_path / "found", options)
    given = replace(options, target_sparsity=None, beta=found["rule"]["beta"])
    assert found == prune(source, tmp_path / "given", given) | {"target_sparsity": 0.4}
    written = files(tmp_path / "found"), files(tmp_path / "given")
    names = [name for name in written[0] if written[0][name] != written[1].get(name)]
    assert (names, written[0].keys()) == (["emp_report.json"], written[1].keys())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_inspect_tells_the_beta_and_what_it_leaves(tmp_path: Path, granularity: str) -> None:
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), mlp(H, F))
    options = PruneOptions(granularity=granularity, target_sparsity=0.4)
    shown, done = inspect(source, options), prune(source, tmp_path / "out", options)
    del shown["totals"]["files"]
    for part in ("rule", "target_sparsity", "totals"):
        assert shown[part] == done[part]


def test_a_model_of_the_hub_is_downloaded_once_and_read_twice(
    hub: HubServer, model: str, local: Path, tmp_path: Path
) -> None:
    options = PruneOptions(target_sparsity=0.4)
    prune(model, tmp_path / "out", options)
    assert [name for name in hub.downloads() if name in SHARDS] == SHARDS
    prune(local, tmp_path / "expected", options)
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


def test_a_run_that_was_killed_goes_on_with_the_same_beta(tmp_path: Path) -> None:
    tensors = mlp(H, F)
    shards = {DOWN: tensors.pop(DOWN)}, tensors
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), *shards)
    options = PruneOptions(target_sparsity=0.4)
    prune(source, tmp_path / "expected", options)
    run = start(prune, source, tmp_path / "out", options, killed_at=30)
    run.join()
    assert len(list((tmp_path / "out" / STAGING_NAME).glob("*.safetensors"))) > 0
    prune(source, tmp_path / "out", options)
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_columns_of_conv1d_and_rows_of_experts_are_counted_as_they_are_pruned(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    for architecture in ("gpt2", "gpt-oss"):
        out = tmp_path / architecture
        report = prune(tiny_model(architecture), out, PruneOptions(target_sparsity=0.45))
        totals = report["totals"]["targets"]
        assert totals["kept"] == round(totals["weights"] * 0.55)


@pytest.mark.parametrize("seed", range(6))
def test_any_groups_are_solved_as_exact_fractions_solve_them(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_numbers_module, "_AT_A_TIME", 5)
    monkeypatch.setattr(group_numbers_module, "_IN_MEMORY", 100 * (seed % 2))
    rng = np.random.default_rng(seed)
    spread = (1, 3)[seed % 2]
    parts = [
        np.exp(spread * rng.normal(size=(rng.integers(1, 9), rng.integers(1, 20))))
        .astype(np.float32)
        .astype(np.float64)
        for _ in range(6)
    ]
    parts[2][0] = 0
    rows = [row for part in parts for row in part]
    weights = sum(row.size for row in rows)
    least, most = kept_at(rows, 1e-300), kept_at(rows, 1e300)
    for wanted in range(least, most + 1, 7):
        beta = found_beta(parts, 1 - wanted / weights, threads=1 + seed % 2)
        assert kept_at(rows, beta) == wanted


@pytest.mark.parametrize(("wanted", "left"), [(16, 16), (18, 16), (20, 16), (21, 24), (24, 24)])
def test_where_equal_rows_step_together_the_nearest_is_left_and_less_between_two(
    wanted: int, left: int
) -> None:
    rows = np.tile(np.abs(gaussian(1, 16, dtype=torch.float32).numpy()), (8, 1))
    beta = found_beta([rows], 1 - wanted / rows.size)
    assert kept_at(list(rows), beta) == left


def test_equal_weights_and_zeros_are_counted_as_they_are(tmp_path: Path) -> None:
    tensors = {
        name: few_values(*shape, seed=seed)
        for seed, (name, shape) in enumerate(((DOWN, (H, F)), (GATE, (F, H)), (UP, (F, H))))
    }
    tensors[GATE][3:6] = 0.0
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), tensors)
    report = prune(source, tmp_path / "out", PruneOptions(target_sparsity=0.6))
    rows = groups_of(tensors, "row")
    live, steps = sum(bool(row.any()) for row in rows), steps_of(rows)
    totals = [live, *(live + bisect_right(steps, step) for step in steps)]
    nearest = min(totals, key=lambda total: (abs(total - round(3 * H * F * 0.4)), total))
    assert report["totals"]["targets"]["kept"] == nearest


def test_the_ends_of_what_can_be_reached_are_reached() -> None:
    rows = np.abs(gaussian(4, 10, dtype=torch.float32).numpy())
    rows[0] = 0
    assert kept_at(list(rows), found_beta([rows], 1 - 3 / 40)) == 3
    assert kept_at(list(rows), found_beta([rows], 1 - 30 / 40)) == 30


@pytest.mark.parametrize("sparsity", [0.2, 0.95])
def test_what_cannot_be_reached_is_refused_with_what_can(sparsity: float) -> None:
    rows = np.abs(gaussian(4, 10, dtype=torch.float32).numpy())
    rows[0] = 0
    with pytest.raises(OptionError, match=r"give 0\.25 to 0\.925 for these targets"):
        found_beta([rows], sparsity)


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.5, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(sparsity: float) -> None:
    with pytest.raises(OptionError, match=r"target_sparsity is .*give a number between 0 and 1"):
        PruneOptions(target_sparsity=sparsity)


def test_two_ways_to_find_beta_are_one_too_many() -> None:
    with pytest.raises(OptionError, match="two ways to find one β"):
        PruneOptions(target_sparsity=0.5, max_loss_increase=1.0)


def test_shards_that_are_read_twice_are_not_discarded(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="discard_source: target_sparsity finds β from all"):
        prune("a/model", tmp_path, PruneOptions(target_sparsity=0.5), discard_source=True)


@pytest.mark.parametrize(
    ("low", "high", "shortest"),
    [
        ("0.69", "0.8", 0.7),
        ("0.709", "0.79", 0.71),
        ("0.7999", "0.8001", 0.8),
        ("0.1234559", "0.1234561", 0.123456),
        ("0.9996", "1.0004", 1.0),
        ("0", "0.5", 0.3),
        ("123.4", "123.49", 123.4),
        ("0.1000000000000000055511151231257828", "0.3", 0.2),  # just above what 0.1 is in float64
    ],
)
def test_the_shortest_number_of_an_interval_is_taken(low: str, high: str, shortest: float) -> None:
    assert shortest_decimal(Fraction(low), Fraction(high)) == shortest


def test_an_interval_without_any_float_gives_the_next_one() -> None:
    low = Fraction(0.5) + Fraction(1, 2**60)
    assert shortest_decimal(low, low + Fraction(1, 2**61)) == np.nextafter(0.5, 1)


def test_numbers_above_any_are_found_where_there_is_no_end() -> None:
    assert shortest_decimal(Fraction("1.57"), None) == 2.0
    assert shortest_decimal(Fraction(0), None) == 1.0
