"""What inspect foretells is what prune then does, and what the rule on whole tensors gives."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import (
    DOWN,
    GATE,
    UP,
    F,
    H,
    gaussian,
    kept_by_rule,
    llama_config,
    load,
    mlp,
    write_checkpoint,
)

from emp_llm import PruneOptions, inspect, prune
from emp_llm.report.outlier_rows import StandingOut
from emp_llm.report.totals import cells, kinds

DEMO = Path(__file__).parents[2] / "demo" / "model"


def one_tensor(folder: Path, weights: torch.Tensor) -> Path:
    """A checkpoint whose one target is this matrix."""
    rows, columns = weights.shape
    return write_checkpoint(folder, llama_config(columns, rows), {UP: weights})


@pytest.fixture(scope="module")
def demo_report() -> dict:
    return inspect(DEMO)


@pytest.mark.parametrize("beta", [0.3, 0.75, 1.0, 1.25, 1.6])
def test_the_bytes_foretold_are_those_written(demo_report, tmp_path: Path, beta: float) -> None:
    report = prune(DEMO, tmp_path / "out", PruneOptions(beta=beta))
    curve = demo_report["curve"]
    at = curve["beta"].index(beta)
    targets = report["totals"]["targets"]
    assert curve["targets"]["bytes"][at] == targets["bytes_after"]
    assert curve["targets"]["kept"][at] == targets["kept"]
    assert curve["targets"]["sparsity"][at] == targets["sparsity"]
    assert curve["targets"]["retained_mass"][at] == pytest.approx(
        targets["retained_mass"], rel=2e-6
    )
    for kind, totals in kinds(report).items():
        assert curve["kinds"][kind]["bytes"][at] == totals["bytes_after"]
        assert curve["kinds"][kind]["kept"][at] == totals["kept"]
    at_beta = inspect(DEMO, PruneOptions(beta=beta), curve=False)
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert at_beta["files"] == {"model.safetensors": {"bytes": written}}
    assert at_beta["totals"]["files"]["bytes_after"] == written


@pytest.mark.parametrize("output_format", ["packed", "dense"])
def test_the_sizes_of_the_files_are_foretold(
    tmp_path: Path, sharded: Path, output_format: str
) -> None:
    report = inspect(sharded)
    prune(sharded, tmp_path / "out", PruneOptions(output_format=output_format))
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    files = report["totals"]["files"]
    if output_format == "packed":
        assert report["files"] == {name: {"bytes": nbytes} for name, nbytes in sizes.items()}
    after = files["bytes_after" if output_format == "packed" else "bytes_dense"]
    assert after == sum(sizes.values())
    assert files["bytes_before"] == sum(p.stat().st_size for p in sharded.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_curve_is_the_rule_on_whole_tensors_at_every_beta(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = mlp(H, F, dtype)
    curve = inspect(write_checkpoint(tmp_path / "source", llama_config(H, F), tensors))["curve"]
    scores = [tensors[name].double().abs().numpy() for name in (DOWN, GATE, UP)]
    total = sum(part.sum() for part in scores)
    for at, beta in enumerate(curve["beta"]):
        kept = [[kept_by_rule(row, beta) for row in part] for part in scores]
        assert curve["targets"]["kept"][at] == sum(np.sum(part) for part in kept)
        mass = sum(np.sum(part[mask]) for part, mask in zip(scores, kept, strict=True))
        assert curve["targets"]["retained_mass"][at] == pytest.approx(mass / total, rel=1e-5)
    assert curve["targets"]["sparsity"][-1] == 0
    assert curve["targets"]["sparsity"][-2] > 0


def test_the_curve_ends_at_the_beta_that_keeps_everything(tmp_path: Path) -> None:
    # N_eff / N is 16/10/4 = 0.4 for the first row, 1 for the second: β = 2.5 keeps all
    weights = torch.tensor([[3.0, 1.0, 0.0, 0.0], [2.0, -2.0, 2.0, 2.0]])
    curve = inspect(one_tensor(tmp_path / "source", weights))["curve"]
    assert curve["beta"][-1] == 2.5
    assert curve["beta"][-2] == 2.0
    assert curve["targets"]["kept"][-2:] == [7, 8]


def test_rows_of_zeros_are_pruned_at_every_beta(tmp_path: Path) -> None:
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, -0.0, 0.0]])
    curve = inspect(one_tensor(tmp_path / "source", weights))["curve"]
    assert curve["beta"][-1] == 1.0
    assert curve["targets"]["sparsity"][-1] == 0.5
    assert curve["targets"]["retained_mass"][-1] == 1.0


def test_a_model_of_zeros_has_a_curve(tmp_path: Path) -> None:
    curve = inspect(one_tensor(tmp_path / "source", torch.zeros(3, 8)))["curve"]
    assert set(curve["targets"]["kept"]) == {0}


def test_the_beta_that_was_asked_for_is_on_the_curve(tmp_path: Path) -> None:
    source = one_tensor(tmp_path / "source", gaussian(3, 40))
    curve = inspect(source, PruneOptions(beta=0.777))["curve"]
    assert {0.5, 0.75, 0.777, 1.0, 1.25} < set(curve["beta"])
    assert curve["beta"] == sorted(curve["beta"])


@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_groups_larger_than_rows_have_no_curve(tmp_path: Path, granularity: str) -> None:
    source = one_tensor(tmp_path / "source", gaussian(3, 40))
    report = inspect(source, PruneOptions(granularity=granularity))
    assert report["curve"] is None
    assert report["standing_out"] == []


def test_the_spread_of_effective_numbers_is_that_of_the_whole_tensors() -> None:
    report, tensors = inspect(DEMO, curve=False), load(DEMO)
    for kind, totals in kinds(report).items():
        fractions = []
        for name, fields in report["tensors"].items():
            if fields["pruned"] and fields["kind"] == kind:
                scores = tensors[name].double().abs()
                n_eff = scores.sum(1) ** 2 / (scores**2).sum(1)
                fractions += (n_eff / scores.shape[1]).tolist()
        expected, _ = np.histogram(fractions, bins=50, range=(0, 1))
        assert totals["n_eff_fraction_histogram"] == expected.tolist()
        assert totals["rows"] == len(fractions)
        assert totals["n_eff_fraction_min"] == pytest.approx(min(fractions), rel=1e-5)
        assert totals["n_eff_fraction_mean"] == pytest.approx(np.mean(fractions), rel=1e-5)
        assert totals["n_eff_fraction_max"] == pytest.approx(max(fractions), rel=1e-5)


def test_totals_by_block_and_kind_are_those_of_their_tensors(tmp_path: Path) -> None:
    layers = {
        name.replace(".0.", f".{number}."): tensor
        for number in range(12)
        for name, tensor in mlp(H, F).items()
    }
    source = write_checkpoint(tmp_path / "source", llama_config(H, F, layers=12), layers)
    report = inspect(source, curve=False)
    found = cells(report)
    assert list(found) == [
        (f"model.layers.{number}", kind) for number in range(12) for kind in kinds(report)
    ]
    fields = report["tensors"]["model.layers.10.mlp.up_proj.weight"]
    totals = found["model.layers.10", "up_proj"]
    for name in ("kept", "sparsity", "bytes_after", "n_eff_fraction_mean"):
        assert totals[name] == fields[name]
    assert totals["retained_mass"] == pytest.approx(fields["retained_mass"], rel=1e-5)
    assert totals["retained_mass_bound"] == pytest.approx(fields["retained_mass_bound"], rel=1e-5)


def test_rows_that_stand_out_are_listed_the_worst_first(tmp_path: Path) -> None:
    weights = gaussian(40, 64).float()
    weights[3] = 0
    weights[7] *= 0.01
    weights[11] = 1.0
    weights[13, 5] = 1000.0
    weights[17] = weights[17].sign()
    weights[17, 0] = 1.1
    report = inspect(one_tensor(tmp_path / "source", weights), curve=False)
    found = [(row["row"], row["why"]) for row in report["standing_out"]]
    assert found == [
        (3, "dead"),
        (11, "nearly uniform"),
        (17, "nearly uniform"),
        (7, "nearly dead"),
        (13, "dominated by few"),
    ]
    assert {row["tensor"] for row in report["standing_out"]} == {UP}
    assert report["standing_out_counts"] == {
        "dead": 1,
        "nearly dead": 1,
        "dominated by few": 1,
        "nearly uniform": 2,
    }
    dead, uniform = report["standing_out"][:2]
    assert (dead["n_eff_fraction"], dead["mass_ratio"]) == (0.0, 0.0)
    assert uniform["n_eff_fraction"] == 1.0
    mass = weights.abs().sum(1).double()
    assert uniform["mass_ratio"] == pytest.approx(
        64 / float(mass[mass > 0].quantile(0.5)), rel=0.02
    )


def test_gaussian_rows_do_not_stand_out(tmp_path: Path) -> None:
    report = inspect(one_tensor(tmp_path / "source", gaussian(200, 64)), curve=False)
    assert report["standing_out"] == []
    assert set(report["standing_out_counts"].values()) == {0}


def test_of_many_rows_that_stand_out_the_worst_are_listed_and_all_counted() -> None:
    standing_out = StandingOut()
    for number in range(3):
        # the mass of row i of the first 90 is 1/(11 + i) of that of the other 110
        mass = np.array([*(1 / (11 + i) for i in range(90)), *[1.0] * 110])
        n_eff = 0.6 * 1000
        standing_out.look(str(number), 1000, np.stack([mass, mass**2 / n_eff], axis=1))
    assert standing_out.counts["nearly dead"] == 270
    rows = standing_out.worst
    assert len(rows) == 100
    assert [row["row"] for row in rows[:7]] == [89, 89, 89, 88, 88, 88, 87]
    assert rows[0]["mass_ratio"] == pytest.approx(1 / 100)


def test_a_share_that_rounding_leaves_a_hair_short_counts_in_its_bin(tmp_path: Path) -> None:
    weights = torch.zeros(3, 10)
    weights[0, :3] = 0.1
    weights[1, :7] = 0.3
    weights[2] = 0.7
    fields = inspect(one_tensor(tmp_path / "source", weights), curve=False)["tensors"][UP]
    histogram = fields["n_eff_fraction_histogram"]
    assert fields["n_eff_fraction_histogram_start"] == 15
    assert [15 + i for i, count in enumerate(histogram) if count] == [15, 35, 49]
    assert math.isclose(fields["n_eff_fraction_min"], 0.3)
