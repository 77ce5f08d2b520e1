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
from support.tuned import merged, sampled, tune

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
    assert stored.keys() == {DOWN, GATE, UP} == report["tensors"].keys()
    before, after = load(base), load(tuned)
    for name, found in stored.items():
        less = (after[name].float() - before[name].float()).bfloat16()
        expected = sampled(name, less, 0.7).bfloat16()
        assert np.array_equal(found, expected.view(torch.uint16).numpy())
        fields = report["tensors"][name]
        assert fields["kept"] == np.count_nonzero(found) < less.numel()
        scores = less.double().abs()
        assert fields["mass"] == pytest.approx(scores.sum().item(), rel=1e-5)
        kept_mass = scores[expected != 0].sum() / scores.sum()
        assert fields["retained_mass"] == pytest.approx(kept_mass.item(), rel=1e-5)
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
    assert (
        differing(load(tmp_path / "whole"), merged(load(base), tensors, tmp_path / "delta")) == []
    )


@pytest.mark.parametrize(
    ("architecture", "sharded"),
    [
        ("llama", True),
        ("gpt2", False),
        ("gpt-oss", True),
        pytest.param("mixtral", True, marks=pytest.mark.slow),
        pytest.param("gpt2", True, marks=pytest.mark.slow),
        pytest.param("t5", False, marks=pytest.mark.slow),
    ],
)
def test_the_sum_is_loaded_and_unpacked(
    tiny_model: TinyModel, tmp_path: Path, architecture: str, sharded: bool
) -> None:
    base = tiny_model(architecture, sharded=sharded)
    tuned = tune(base, tmp_path / "tuned")
    report = prune(tuned, tmp_path / "delta", base=base)
    pruned = {name for name, fields in report["tensors"].items() if fields["pruned"]}
    assert pruned == set(EXPECTED[architecture].mlp)
    unpack(tmp_path / "delta", tmp_path / "whole")
    whole = load(tmp_path / "whole")
    assert differing(whole, merged(load(base), load(tuned), tmp_path / "delta")) == []
    assert verify(tmp_path / "delta", against=tuned)["masks_derived"] is True
    loaded = load_model(architecture, tmp_path / "delta")
    dense = load_model(architecture, tmp_path / "whole")
    assert differing(state(loaded), state(dense)) == []
    assert torch.equal(logits(loaded), logits(dense))


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
    assert differing(load(tmp_path / "whole"), merged(load(base), noisy, tmp_path / "delta")) == []


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
