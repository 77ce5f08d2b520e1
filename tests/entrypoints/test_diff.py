"""diff tells how the weights of two checkpoints differ, whichever way they are stored."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emp_cli.app import app
from safetensors.torch import save_file
from support.checkpoints import (
    DOWN,
    GATE,
    UP,
    F,
    H,
    Tensors,
    bits,
    files,
    gaussian,
    llama_config,
    load,
    mlp,
    write_checkpoint,
)
from support.hub_server import HubServer
from typer.testing import CliRunner

from emp_llm import CheckpointError, FormatError, OptionError, PruneOptions, diff, prune

TinyModel = Callable[..., Path]

NORM = "model.norm.weight"


def checkpoint(folder: Path, tensors: Tensors) -> Path:
    return write_checkpoint(folder, llama_config(H, F), tensors)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A source; pruned at β = 1 to both formats, and at β = 0.6."""
    folder = tmp_path_factory.mktemp("diff")
    checkpoint(folder / "source", mlp(H, F) | {NORM: gaussian(H)})
    prune(folder / "source", folder / "packed")
    prune(folder / "source", folder / "dense", PruneOptions(output_format="dense"))
    prune(folder / "source", folder / "sparser", PruneOptions(beta=0.6))
    prune(
        folder / "source", folder / "sparser dense", PruneOptions(beta=0.6, output_format="dense")
    )
    return {path.name: path for path in folder.iterdir()}


def counted(a: torch.Tensor, b: torch.Tensor) -> dict[str, object]:
    """What two tensors have in common, worked out on whole tensors."""
    keeps_a, keeps_b = a != 0, b != 0
    both, either = keeps_a & keeps_b, keeps_a | keeps_b
    changed = both & (a != b)
    change = (a.double() - b.double()).abs()[changed]
    return {
        "weights": a.numel(),
        "kept_a": int(keeps_a.sum()),
        "kept_b": int(keeps_b.sum()),
        "kept_both": int(both.sum()),
        "changed": int(changed.sum()),
        "largest_change": float(f"{change.max():.6g}") if change.numel() else 0.0,
        "overlap": float(f"{int(both.sum()) / int(either.sum()):.6g}") if either.any() else 1.0,
        "a_in_b": float(f"{int(both.sum()) / int(keeps_a.sum()):.6g}") if keeps_a.any() else 1.0,
        "b_in_a": float(f"{int(both.sum()) / int(keeps_b.sum()):.6g}") if keeps_b.any() else 1.0,
        "same": int(bits(a) == bits(b)),
        "same_masks": int(bool((keeps_a == keeps_b).all())),
    }


def of(found: dict, name: str) -> dict[str, object]:
    """What diff tells of a tensor, as far as `counted` knows it."""
    return {key: found["tensors"][name][key] for key in counted(torch.ones(1), torch.ones(1))}


@pytest.mark.parametrize("b", ["sparser", "sparser dense", "source", "packed", "dense"])
@pytest.mark.parametrize("a", ["packed", "dense", "source"])
def test_masks_and_weights_are_compared_whichever_way_they_are_stored(
    written: dict[str, Path], a: str, b: str
) -> None:
    twin = {"packed": "dense", "sparser": "sparser dense"}
    tensors_a, tensors_b = (load(written[twin.get(name, name)]) for name in (a, b))
    found = diff(written[a], written[b])
    for name in (DOWN, GATE, UP, NORM):
        assert of(found, name) == counted(tensors_a[name], tensors_b[name])
    assert found["same_weights"] == (twin.get(a, a) == twin.get(b, b))
    assert found["only_in_a"] == found["only_in_b"] == []


def test_totals_and_kinds_are_the_sums_of_the_tensors(written: dict[str, Path]) -> None:
    found = diff(written["packed"], written["sparser"])
    assert found["kinds"].keys() == {"down_proj", "gate_proj", "up_proj", "norm"}
    fields = ("weights", "kept_a", "kept_b", "kept_both", "changed", "bytes_a", "bytes_b", "same")
    for field in fields:
        total = sum(part[field] for part in found["tensors"].values())
        assert found["totals"][field] == total
        assert sum(part[field] for part in found["kinds"].values()) == total
    assert found["kinds"]["up_proj"]["kept_a"] == found["tensors"][UP]["kept_a"]


def test_bytes_are_those_that_are_stored(written: dict[str, Path]) -> None:
    found = diff(written["packed"], written["dense"])
    planes = [load(written["packed"])[UP + suffix] for suffix in ("", ".emp_rows", ".emp_meta")]
    assert found["tensors"][UP]["bytes_a"] == sum(plane.nbytes for plane in planes)
    assert found["tensors"][UP]["bytes_b"] == load(written["dense"])[UP].nbytes
    assert found["a"]["bytes"] == found["totals"]["bytes_a"]
    assert found["b"]["bytes"] == found["totals"]["bytes_b"]


@pytest.mark.parametrize("architecture", ["gpt2", "gpt-oss", "mixtral"])
def test_columns_and_fused_experts_are_compared(
    tiny_model: TinyModel, pruned_model: TinyModel, architecture: str
) -> None:
    packed, dense = (pruned_model(architecture, output_format=f) for f in ("packed", "dense"))
    assert diff(packed, dense)["same_weights"]
    source, left = load(tiny_model(architecture)), load(dense)
    found = diff(tiny_model(architecture), packed)
    assert not found["same_weights"]
    for name in left:
        assert of(found, name) == counted(source[name], left[name])
    report = json.loads((packed / "emp_report.json").read_text())
    assert {n: part["kind"] for n, part in found["tensors"].items()} == {
        name: fields["kind"] for name, fields in report["tensors"].items()
    }


def test_kinds_come_from_the_structure_where_there_is_no_report(
    tiny_model: TinyModel,
) -> None:
    source = tiny_model("mixtral")
    found = diff(source, source)
    assert found["same_weights"]
    assert {"experts.w1", "experts.w2", "experts.w3"} <= found["kinds"].keys()


def test_a_model_of_unknown_structure_has_the_kinds_of_its_modules(tmp_path: Path) -> None:
    config = {"model_type": "of my own"}
    tensors = {"layers.0.mix.weight": gaussian(4, 4), "scale": gaussian(3)}
    folder = write_checkpoint(tmp_path / "own", config, tensors)
    found = diff(folder, folder)
    assert found["same_weights"]
    assert found["kinds"].keys() == {"mix", "scale"}


def test_kept_weights_that_changed_are_counted(written: dict[str, Path], tmp_path: Path) -> None:
    tensors = load(written["dense"])
    changed = tensors[UP].clone()
    for place in changed.nonzero()[[3, 8, 20]]:
        changed[tuple(place)] *= 3
    other = checkpoint(tmp_path / "other", tensors | {UP: changed})
    for a in ("packed", "dense"):
        found = diff(written[a], other)
        assert of(found, UP) == counted(tensors[UP], changed)
        assert found["tensors"][UP]["changed"] == 3
        assert found["totals"]["changed"] == 3
        assert found["totals"]["same"] == 3
        assert found["totals"]["same_masks"] == 4


def test_zeros_of_either_sign_are_pruned_and_told_apart(tmp_path: Path) -> None:
    ones = torch.ones(2, 3, dtype=torch.bfloat16)
    positive, negative = ones.clone(), ones.clone()
    positive[0, 1], negative[0, 1] = 0.0, -0.0
    a = checkpoint(tmp_path / "a", {UP: positive})
    b = checkpoint(tmp_path / "b", {UP: negative})
    part = diff(a, b)["tensors"][UP]
    assert (part["kept_a"], part["kept_b"], part["changed"]) == (5, 5, 0)
    assert (part["same_masks"], part["same"], part["zero_signs"]) == (1, 0, 1)
    assert not diff(a, b)["same_weights"]


def test_what_is_not_finite_is_counted_apart(tmp_path: Path) -> None:
    ones = torch.ones(2, 3, dtype=torch.float32)
    other = ones.clone()
    other[0, 0], other[0, 1], other[1, 2] = float("nan"), float("-inf"), 1.5
    a = checkpoint(tmp_path / "a", {UP: ones})
    part = diff(a, checkpoint(tmp_path / "b", {UP: other}))["tensors"][UP]
    assert (part["changed"], part["not_finite"], part["largest_change"]) == (3, 2, 0.5)
    same = diff(tmp_path / "b", tmp_path / "b")["tensors"][UP]
    assert (same["same"], same["not_finite"]) == (1, 0)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.uint8, torch.bool, torch.float64, torch.float8_e4m3fn], ids=str
)
def test_tensors_of_other_dtypes_are_compared_item_by_item(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    first = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    second = torch.tensor([[0, 0, 1], [1, 0, 0]]).to(dtype)
    a = checkpoint(tmp_path / "a", {"buffer": first, "empty": torch.zeros(0, 3)})
    b = checkpoint(tmp_path / "b", {"buffer": second, "empty": torch.zeros(0, 3)})
    found = diff(a, b)
    assert (found["tensors"]["buffer"]["weights"], found["tensors"]["buffer"]["changed"]) == (6, 2)
    assert found["tensors"]["empty"]["same"] == 1
    assert diff(a, a)["same_weights"]


def test_tensors_that_one_side_lacks_or_has_of_another_kind_are_named(tmp_path: Path) -> None:
    tensors = mlp(H, F)
    a = checkpoint(tmp_path / "a", tensors | {"a.weight": gaussian(2)})
    b = checkpoint(
        tmp_path / "b",
        {UP: tensors[UP].float(), GATE: gaussian(H, F), DOWN: tensors[DOWN], "b": gaussian(2)},
    )
    found = diff(a, b)
    assert found["only_in_a"] == ["a.weight"]
    assert found["only_in_b"] == ["b"]
    assert found["other_kind"] == {
        GATE: {"a": f"BF16 [{F}, {H}]", "b": f"BF16 [{H}, {F}]"},
        UP: {"a": f"BF16 [{F}, {H}]", "b": f"F32 [{F}, {H}]"},
    }
    assert found["totals"]["tensors"] == found["totals"]["same"] == 1
    assert not found["same_weights"]


def test_a_tensor_more_is_a_difference(written: dict[str, Path], tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "other", load(written["source"]) | {"more": gaussian(2)})
    assert not diff(written["source"], other)["same_weights"]
    assert not diff(other, written["source"])["same_weights"]


def test_an_option_at_its_default_is_told_by_its_name(
    written: dict[str, Path], tmp_path: Path
) -> None:
    prune(written["source"], tmp_path / "uniform", PruneOptions(allocate="uniform"))
    found = diff(written["packed"], tmp_path / "uniform")
    assert found["rule"] == {"allocate": {"a": "emp", "b": "uniform"}}


def test_rules_and_configs_that_differ_are_told(written: dict[str, Path], tmp_path: Path) -> None:
    found = diff(written["packed"], written["sparser"])
    assert found["rule"] == {"beta": {"a": 1.0, "b": 0.6}}
    assert found["config"] == {}
    assert (found["a"]["format"], found["a"]["rule"]["granularity"]) == ("packed", "row")
    other = Path(shutil.copytree(written["source"], tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config |= {"rms_norm_eps": 1e-5, "vocab_size": 9, "transformers_version": "0"}
    (other / "config.json").write_text(json.dumps(config))
    found = diff(written["dense"], other)
    assert found["config"] == {
        "rms_norm_eps": {"a": None, "b": 1e-5},
        "vocab_size": {"a": 8, "b": 9},
    }
    assert (found["b"]["format"], found["b"]["rule"]) == ("dense", None)


def test_other_shards_and_small_blocks_change_nothing(
    written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load(written["dense"])
    shards = {UP: tensors[UP], NORM: tensors[NORM]}, {DOWN: tensors[DOWN], GATE: tensors[GATE]}
    sharded = write_checkpoint(tmp_path / "sharded", llama_config(H, F), *shards)
    assert diff(written["packed"], sharded)["same_weights"]
    assert diff(sharded, written["packed"])["same_weights"]
    once = diff(written["packed"], written["sparser dense"], threads=1)
    monkeypatch.setattr("emp_llm.tensors.geometry.ROW_BLOCK_BYTES", 3 * F * 2)
    monkeypatch.setattr("emp_llm.verification.weight_differences.COPY_BYTES", 16)
    assert diff(written["packed"], written["sparser dense"], threads=5) == once
    assert (
        diff(written["dense"], written["sparser dense"])["totals"]["kept_both"]
        == (once["totals"]["kept_both"])
    )


def test_two_models_of_the_hub_are_compared(hub: HubServer, written: dict[str, Path]) -> None:
    hub.commit("me/one", files(written["packed"]))
    hub.commit("me/two", files(written["sparser"]))
    found = diff("me/one", "me/two")
    assert found["totals"] == diff(written["packed"], written["sparser"])["totals"]
    assert len(found["a"]["revision"]) == 40


def test_two_revisions_of_a_model_are_compared(hub: HubServer, written: dict[str, Path]) -> None:
    first = hub.commit("me/one", files(written["packed"]))
    second = hub.commit("me/one", files(written["sparser"]))
    found = diff("me/one", "me/one", revision_a=first, revision_b=second)
    assert (found["a"]["revision"], found["b"]["revision"]) == (first, second)
    assert found["rule"] == {"beta": {"a": 1.0, "b": 0.6}}


def test_what_cannot_be_compared_is_refused(written: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        diff(written["packed"], tmp_path / "not" / "there")
    with pytest.raises(OptionError, match="is a local folder"):
        diff(written["packed"], written["dense"], revision_a="main")
    damaged = Path(shutil.copytree(written["packed"], tmp_path / "damaged"))
    tensors = load(damaged)
    tensors[UP][0] ^= 1
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(FormatError, match="row 0"):
        diff(written["dense"], damaged)


def test_comparing_changes_nothing(written: dict[str, Path]) -> None:
    before = {name: files(folder) for name, folder in written.items()}
    diff(written["packed"], written["source"])
    assert {name: files(folder) for name, folder in written.items()} == before


# --- the command ---------------------------------------------------------------------------------


def run(*args: object):
    return CliRunner().invoke(app, ["diff", *map(str, args)], env={"COLUMNS": "80"})


def test_the_table_has_the_layers_that_differ(written: dict[str, Path]) -> None:
    result = run(written["packed"], written["sparser"])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines[2:-1])) <= 80
    rows = [line.split()[0] for line in lines if "_proj " in line]
    assert rows == ["down_proj", "gate_proj", "up_proj"]
    assert "rule: beta 1.0 / 0.6" in lines
    assert lines[-1].startswith("other weights: 1 of 4 tensors are the same; other masks: B keeps")


def test_the_same_weights_are_said_to_be_the_same(written: dict[str, Path]) -> None:
    result = run(written["packed"], written["dense"], "--exit-code")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "the same weights: all 4 tensors, bit for bit"


def test_tensors_get_lines_of_their_own(written: dict[str, Path]) -> None:
    text = run(written["packed"], written["sparser"], "--tensors").stdout
    assert "".join(line[1:17].strip() for line in text.splitlines()).count("model.layers.0") == 3


@pytest.mark.parametrize("as_json", [True, False])
def test_the_exit_status_tells_of_a_difference_if_it_is_asked_to(
    written: dict[str, Path], as_json: bool
) -> None:
    options = ["--json"] if as_json else []
    assert run(written["packed"], written["sparser"], *options).exit_code == 0
    assert run(written["packed"], written["sparser"], "--exit-code", *options).exit_code == 1


def test_json_is_one_object(written: dict[str, Path]) -> None:
    result = run(written["packed"], written["sparser"], "--json")
    found = json.loads(result.stdout)
    assert found.pop("seconds") > 0
    assert found.pop("peak_memory_bytes") > 0
    assert found == diff(written["packed"], written["sparser"])


def test_what_one_side_lacks_is_told(written: dict[str, Path], tmp_path: Path) -> None:
    tensors = load(written["source"])
    other = checkpoint(tmp_path / "other", {UP: tensors[UP].float(), NORM: tensors[NORM]})
    lines = run(written["source"], other).stdout.splitlines()
    assert f"only in A: {DOWN}, {GATE}" in lines
    assert f"of other dtype or shape: {UP} BF16 [{F}, {H}] / F32 [{F}, {H}]" in lines
