"""A delta is the pruned difference to a base, and gives the sum of the two when it is loaded."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import (
    DOWN,
    GATE,
    UP,
    F,
    H,
    differing,
    files,
    gaussian,
    llama_config,
    load,
    mlp,
    write_checkpoint,
)
from support.expected_targets import EXPECTED
from support.format_reader import read_packed
from support.loading import load_model, logits, state
from support.tuned import less, merged, tune

from emp_llm import PruneOptions, prune, unpack, verify

TinyModel = Callable[..., Path]

NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors = {**mlp(H, F), NORM: gaussian(H), HEAD: gaussian(8, H, seed=5)}
    return write_checkpoint(tmp_path / "base", llama_config(H, F), tensors)


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Path:
    return tune(base, tmp_path / "tuned", changed="mlp")


def test_what_is_stored_are_the_pruned_differences(base: Path, tuned: Path, tmp_path: Path) -> None:
    report = prune(tuned, tmp_path / "delta", PruneOptions(beta=0.7), base=base)
    stored = read_packed(tmp_path / "delta" / "model.safetensors")
    kept = less(load(base), load(tuned), [DOWN, GATE, UP], beta=0.7)
    assert stored.keys() == kept.keys() == report["tensors"].keys()
    for name, expected in kept.items():
        assert np.array_equal(stored[name], expected.view(torch.uint16).numpy())
    assert report["in_base"] == {"tensors": 2, "bytes": 2 * (H + 8 * H)}


def test_tensors_that_are_no_targets_are_stored_whole_unless_the_base_has_them(
    base: Path, tmp_path: Path
) -> None:
    tuned = tune(base, tmp_path / "tuned")
    tensors = load(tuned) | {NORM: load(base)[NORM], HEAD: gaussian(9, H)}  # a token was added
    save_file(tensors, tuned / "model.safetensors")
    config = json.loads((tuned / "config.json").read_text()) | {"vocab_size": 9}
    (tuned / "config.json").write_text(json.dumps(config))
    prune(tuned, tmp_path / "delta", base=base)
    stored = load_file(tmp_path / "delta" / "model.safetensors")
    assert NORM not in stored
    assert torch.equal(stored[HEAD], tensors[HEAD])
    unpack(tmp_path / "delta", tmp_path / "whole")
    assert differing(load(tmp_path / "whole"), merged(load(base), tensors, [DOWN, GATE, UP])) == []


@pytest.mark.parametrize(
    ("architecture", "granularity", "sharded"),
    [
        ("llama", "layer", True),
        ("gpt2", "row", False),
        ("gpt-oss", "model", True),
        pytest.param("mixtral", "row", True, marks=pytest.mark.slow),
        pytest.param("gpt2", "model", True, marks=pytest.mark.slow),
        pytest.param("t5", "row", False, marks=pytest.mark.slow),
    ],
)
def test_the_sum_is_loaded_and_unpacked(
    tiny_model: TinyModel, tmp_path: Path, architecture: str, granularity: str, sharded: bool
) -> None:
    base = tiny_model(architecture, sharded=sharded)
    tuned = tune(base, tmp_path / "tuned")
    prune(tuned, tmp_path / "delta", PruneOptions(granularity=granularity), base=base)
    unpack(tmp_path / "delta", tmp_path / "whole")
    expected = EXPECTED[architecture]
    sums = merged(
        load(base),
        load(tuned),
        expected.mlp,
        granularity=granularity,
        transposed=expected.transposed,
    )
    assert differing(load(tmp_path / "whole"), sums) == []
    assert verify(tmp_path / "delta", against=tuned)["masks_derived"] is True
    loaded = load_model(architecture, tmp_path / "delta")
    whole = load_model(architecture, tmp_path / "whole")
    assert differing(state(loaded), state(whole)) == []
    assert torch.equal(logits(loaded), logits(whole))


@pytest.mark.parametrize(
    ("dtype", "base_dtype"),
    [(torch.float16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2],
)
def test_base_and_model_may_have_different_dtypes(
    tmp_path: Path, dtype: torch.dtype, base_dtype: torch.dtype
) -> None:
    base = write_checkpoint(tmp_path / "base", llama_config(H, F), mlp(H, F, base_dtype))
    noisy = {n: (t.float() + gaussian(*t.shape) * 0.01).to(dtype) for n, t in load(base).items()}
    tuned = write_checkpoint(tmp_path / "tuned", llama_config(H, F), noisy)
    prune(tuned, tmp_path / "delta", base=base)
    unpack(tmp_path / "delta", tmp_path / "whole")
    assert differing(load(tmp_path / "whole"), merged(load(base), noisy, [DOWN, GATE, UP])) == []


def test_a_loaded_model_is_an_ordinary_one_and_saved_dense(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = tiny_model("mixtral")
    tuned = tune(base, tmp_path / "tuned")
    prune(tuned, tmp_path / "delta", base=base)
    unpack(tmp_path / "delta", tmp_path / "whole")
    model = load_model("mixtral", tmp_path / "delta")
    model.save_pretrained(tmp_path / "saved")
    assert differing(load(tmp_path / "saved"), load(tmp_path / "whole")) == []
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())


def test_the_bytes_do_not_depend_on_threads_and_blocks(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model("gpt2")
    tuned = tune(base, tmp_path / "tuned")
    prune(tuned, tmp_path / "once", base=base, threads=1)
    unpack(tmp_path / "once", tmp_path / "whole", threads=1)
    monkeypatch.setattr("emp_llm.deltas.survey.COPY_BYTES", 100)
    monkeypatch.setattr("emp_llm.deltas.arithmetic._AT_ONCE", 3)
    for threads in (1, 3):
        prune(tuned, tmp_path / f"{threads}", base=base, threads=threads)
        assert files(tmp_path / f"{threads}") == files(tmp_path / "once")
        unpack(tmp_path / f"{threads}", tmp_path / f"whole {threads}", threads=threads)
        assert files(tmp_path / f"whole {threads}") == files(tmp_path / "whole")


@pytest.mark.usefixtures("base")
def test_a_base_that_was_given_by_a_relative_path_is_found_beside_the_delta(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prune(tuned, "delta", base="base")
    (tmp_path / "elsewhere").mkdir()
    for name in ("base", "delta"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    monkeypatch.chdir("/")
    unpack(tmp_path / "elsewhere" / "delta", tmp_path / "whole")
    assert verify(tmp_path / "elsewhere" / "delta")["pruned_tensors"] == 3


def test_a_base_may_be_sharded_in_another_way(base: Path, tuned: Path, tmp_path: Path) -> None:
    prune(tuned, tmp_path / "delta", base=base)
    unpack(tmp_path / "delta", tmp_path / "whole")
    tensors = load(base)
    parts = [{name: tensors[name]} for name in tensors]
    for file in base.iterdir():
        file.unlink()
    base.rmdir()
    write_checkpoint(base, llama_config(H, F), *parts)
    unpack(tmp_path / "delta", tmp_path / "again")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) == len(parts)
    assert differing(load(tmp_path / "again"), load(tmp_path / "whole")) == []
