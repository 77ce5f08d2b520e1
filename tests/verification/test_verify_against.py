"""verify --against accepts what pruning the source leaves, to the bit, and nothing else."""

from pathlib import Path

import pytest
import torch
from support.checkpoints import (
    DOWN,
    GATE,
    UP,
    Tensors,
    files,
    llama_config,
    load,
    write_checkpoint,
)
from support.compared_folders import (
    FORMATS,
    GRANULARITIES,
    NORM,
    TARGETS,
    F,
    H,
    TinyModel,
    expected,
    refusal,
    source_with_ties,
    weights_with_ties,
)
from support.expected_targets import EXPECTED
from support.tampering import edit_json, replace_weights

from emp_llm import (
    PruneOptions,
    prune,
    unpack,
    verify,
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return source_with_ties(tmp_path / "source")


@pytest.fixture(params=FORMATS)
def written(request: pytest.FixtureRequest, source: Path, tmp_path: Path) -> Path:
    """The source pruned with the paper's rule."""
    prune(source, tmp_path / "out", PruneOptions(output_format=request.param))
    return tmp_path / "out"


@pytest.mark.parametrize("beta", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("output_format", FORMATS)
def test_what_prune_writes_is_what_the_source_gives(
    source: Path, tmp_path: Path, output_format: str, granularity: str, beta: float
) -> None:
    options = PruneOptions(granularity=granularity, beta=beta, output_format=output_format)
    prune(source, tmp_path / "out", options)
    found = verify(tmp_path / "out", against=source)
    kept = sum(int(t.count_nonzero()) for n, t in expected(granularity, beta).items() if n != NORM)
    assert (found["tensors"], found["pruned_tensors"]) == (4, 3)
    assert found["kept"] >= kept  # zeros may be kept where β is above 1
    assert found["against"] == str(source)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes_are_compared(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = weights_with_ties(dtype)
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), tensors)
    prune(source, tmp_path / "out", PruneOptions(granularity="layer"))
    assert verify(tmp_path / "out", against=source)["pruned_tensors"] == 3


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("architecture", ["gpt2", "gpt-oss", "mixtral"])
@pytest.mark.parametrize("output_format", FORMATS)
def test_columns_and_fused_experts_are_compared(
    tiny_model: TinyModel, tmp_path: Path, output_format: str, architecture: str, granularity: str
) -> None:
    source = tiny_model(architecture)
    options = PruneOptions(granularity=granularity, output_format=output_format)
    prune(source, tmp_path / "out", options)
    found = verify(tmp_path / "out", against=source)
    assert found["pruned_tensors"] == len(EXPECTED[architecture].mlp)


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_sharded_source_is_compared(
    tiny_model: TinyModel, tmp_path: Path, output_format: str
) -> None:
    source = tiny_model("llama", sharded=True)
    prune(source, tmp_path / "out", PruneOptions(output_format=output_format))
    found = verify(tmp_path / "out", against=source)
    assert found["pruned_tensors"] == len(EXPECTED["llama"].mlp)


def test_what_was_unpacked_is_compared(source: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "dense")
    assert verify(tmp_path / "dense", against=source)["pruned_tensors"] == 3


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_many_small_blocks_and_threads_compare_the_same(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, granularity: str
) -> None:
    monkeypatch.setattr("emp_llm.tensors.geometry.ROW_BLOCK_BYTES", 3 * F * 2)
    prune(source, tmp_path / "out", PruneOptions(granularity=granularity))
    once = verify(tmp_path / "out", against=source, threads=1)
    assert once == verify(tmp_path / "out", against=source, threads=5)
    flipped = flip_last_weight(expected(granularity)[UP])
    replace_weights(tmp_path / "out", UP, flipped)
    assert f"row {F - 1}" in refusal(tmp_path / "out", source)


def flip_last_weight(weights: torch.Tensor) -> torch.Tensor:
    """The last kept weight with its sign turned."""
    changed = weights.clone()
    last = tuple(changed.nonzero()[-1].tolist())
    changed[last] = -changed[last]
    return changed


def test_a_kept_weight_with_a_flipped_bit_is_named_with_both_values(
    written: Path, source: Path
) -> None:
    weights = expected()[GATE]
    row, column = weights.nonzero()[7].tolist()
    changed = weights.clone()
    changed.view(torch.int16)[row, column] ^= 1
    replace_weights(written, GATE, changed)
    assert verify(written)["hashes"]
    message = refusal(written, source)
    bits = int(weights.view(torch.int16)[row, column]) & 0xFFFF
    assert repr(GATE) in message
    assert f"row {row} column {column} is" in message
    assert f"(0x{bits ^ 1:04x})" in message
    assert f"gives {float(weights[row, column]):.9g} (0x{bits:04x})" in message


def test_a_row_of_a_transposed_tensor_is_a_column_of_the_matrix(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    prune(tiny_model("gpt2"), tmp_path / "out")
    unpack(tmp_path / "out", tmp_path / "dense")
    name = EXPECTED["gpt2"].mlp[0]
    weights = load(tmp_path / "dense")[name]
    column, row = weights.nonzero()[5].tolist()
    weights[column, row] *= 2
    replace_weights(tmp_path / "out", name, weights)
    assert f"{name!r} row {row} column {column} is" in refusal(tmp_path / "out", tiny_model("gpt2"))


def test_a_weight_too_many_is_found(written: Path, source: Path) -> None:
    original, weights = weights_with_ties()[UP], expected()[UP].clone()
    row, column = ((weights == 0) & (original != 0)).nonzero()[3].tolist()
    weights[row, column] = original[row, column]
    replace_weights(written, UP, weights)
    message = refusal(written, source)
    assert f"row {row} column {column} is {float(original[row, column]):.9g}" in message
    assert "for the rule prunes it" in message


def test_a_weight_too_few_is_found(written: Path, source: Path) -> None:
    weights = expected()[DOWN].clone()
    row, column = weights.nonzero()[9].tolist()
    weights[row, column] = 0.0
    replace_weights(written, DOWN, weights)
    message = refusal(written, source)
    assert f"row {row} column {column} is 0 (0x0000)" in message
    assert "for the rule keeps it" in message


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("output_format", FORMATS)
def test_a_tie_that_went_to_the_wrong_weight_is_found(
    source: Path, tmp_path: Path, output_format: str, granularity: str
) -> None:
    options = PruneOptions(granularity=granularity, output_format=output_format)
    prune(source, tmp_path / "out", options)
    originals, left = weights_with_ties(), expected(granularity)
    name, first, second = tie(originals, left, granularity)
    changed = left[name].clone().reshape(-1)
    changed[first] = 0.0
    changed[second] = originals[name].reshape(-1)[second]
    replace_weights(tmp_path / "out", name, changed.reshape(left[name].shape))
    row, column = divmod(first, originals[name].shape[1])
    assert f"{name!r} row {row} column {column} is 0" in refusal(tmp_path / "out", source)


def tie(originals: Tensors, left: Tensors, granularity: str) -> tuple[str, int, int]:
    """A tensor, and in one group of it a kept weight before a pruned one of the same magnitude."""
    for name in TARGETS:
        width = originals[name].shape[1] if granularity == "row" else originals[name].numel()
        magnitudes = originals[name].abs().reshape(-1).tolist()
        kept = (left[name] != 0).reshape(-1).tolist()
        for start in range(0, len(kept), width):
            for second in range(start, min(start + width, len(kept))):
                for first in range(start, second):
                    if (
                        kept[first]
                        and not kept[second]
                        and magnitudes[first] == magnitudes[second] != 0
                    ):
                        return name, first, second
    raise AssertionError("no tie among the weights")


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_there_are_ties_that_the_rule_decides(granularity: str) -> None:
    assert tie(weights_with_ties(), expected(granularity), granularity)


def test_a_zero_with_a_sign_is_found(source: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "out", PruneOptions(output_format="dense", beta=1.5))
    weights = expected(beta=1.5)[GATE].clone()
    row, column = (weights.view(torch.int16) == 0).nonzero()[0].tolist()
    weights[row, column] = -0.0
    replace_weights(tmp_path / "out", GATE, weights)
    edit_json(tmp_path / "out" / "emp_report.json", lambda report: keep_all(report, GATE))
    assert f"row {row} column {column} is -0 (0x8000)" in refusal(tmp_path / "out", source)


def keep_all(report: dict, name: str) -> None:
    """Have a report count every weight of a tensor as kept, in its totals as well."""
    more = report["tensors"][name]["weights"] - report["tensors"][name]["kept"]
    report["tensors"][name].update(kept=report["tensors"][name]["weights"], sparsity=0.0)
    for part in ("targets", "model"):
        sums = report["totals"][part]
        sums["kept"] += more
        sums["sparsity"] = float(f"{(sums['weights'] - sums['kept']) / sums['weights']:.6g}")


def test_a_changed_tensor_that_is_not_pruned_is_found(written: Path, source: Path) -> None:
    norm = weights_with_ties()[NORM].clone()
    norm.view(torch.int16)[5] ^= 1
    replace_weights(written, NORM, norm)
    assert verify(written)["hashes"]
    assert f"{NORM!r} item [5] is {float(norm[5]):.9g} (0x" in refusal(written, source)


def test_of_several_faults_the_first_is_told(
    written: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emp_llm.tensors.geometry.ROW_BLOCK_BYTES", H * 2)
    weights = expected()[UP]
    replace_weights(written, UP, torch.where(weights != 0, -weights, weights))
    row, column = weights.nonzero()[0].tolist()
    for _ in range(5):
        assert f"row {row} column {column} is" in refusal(written, source)


def test_comparing_changes_nothing(written: Path, source: Path) -> None:
    before = files(written), files(source)
    verify(written, against=source)
    assert (files(written), files(source)) == before
