"""Weights that stay packed in memory: the same model as the dense one, in less of it."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import ARCHITECTURES
from support.checkpoints import differing, load
from support.expected_targets import EXPECTED
from support.loading import DTYPES, load_model, logits, state
from support.wide_models import WIDE, WideModel

from emp_llm import EmpConfig, PruneOptions, densify, prune
from emp_llm.errors import OptionError
from emp_llm.integration import keeping
from emp_llm.resident.weight import PackedWeight

TinyModel = Callable[..., Path]
KEPT = EmpConfig(keep_packed=True)
BOUND = {torch.bfloat16: 0.02, torch.float16: 0.003, torch.float32: 1e-5}
"""Of a logit's difference, as a share of the largest one."""


def unpacked(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's state with packed weights decoded."""
    return {
        name: tensor.unpacked() if isinstance(tensor, PackedWeight) else tensor
        for name, tensor in model.state_dict().items()
    }


def packed_names(model: torch.nn.Module) -> set[str]:
    return {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if isinstance(parameter, PackedWeight)
    }


def assert_same(found: Any, expected: Any) -> None:
    assert packed_names(found)
    assert differing(unpacked(found), state(expected)) == []
    assert far_from(logits(found), logits(expected)) <= BOUND[expected.dtype]


def far_from(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number that is expected."""
    found, expected = found.float(), expected.float()
    return float((found - expected).abs().max() / expected.abs().max())


def assert_saved_alike(folder: Path) -> None:
    assert differing(load(folder / "saved"), load(folder / "expected")) == []
    saved, expected = (folder / name / "config.json" for name in ("saved", "expected"))
    assert saved.read_bytes() == expected.read_bytes()


ONE_DTYPE_EACH = [
    (architecture, list(DTYPES.values())[number % len(DTYPES)])
    for number, architecture in enumerate(ARCHITECTURES)
]


@pytest.mark.parametrize(("architecture", "dtype"), ONE_DTYPE_EACH, ids=ARCHITECTURES)
def test_a_packed_checkpoint_stays_packed_and_is_saved_as_it_was(
    pruned_model: TinyModel, expected_model: Any, tmp_path: Path, architecture: str, dtype: Any
) -> None:
    packed = pruned_model(architecture, dtype)
    model = load_model(architecture, packed, quantization_config=KEPT)
    weights, said = expected_model(architecture, dtype)
    assert packed_names(model)
    assert differing(unpacked(model), weights) == []
    assert far_from(logits(model), said) <= BOUND[dtype]
    model.save_pretrained(tmp_path / "saved")
    load_model(architecture, packed).save_pretrained(tmp_path / "expected")
    assert_saved_alike(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "phi3", "t5", "mixtral", "gpt-oss"])
def test_a_dense_checkpoint_is_pruned_and_stays_packed(
    tiny_model: TinyModel, expected_model: Any, tmp_path: Path, architecture: str, dtype: Any
) -> None:
    source = tiny_model(architecture, dtype)
    model = load_model(architecture, source, quantization_config=KEPT)
    weights, _ = expected_model(architecture, dtype)
    assert packed_names(model)
    assert differing(unpacked(model), weights) == []
    model.save_pretrained(tmp_path / "saved")
    dense = load_model(architecture, source, quantization_config=EmpConfig())
    dense.save_pretrained(tmp_path / "expected")
    assert_saved_alike(tmp_path)


@pytest.mark.parametrize("architecture", WIDE)
def test_the_rest_stays_packed_too(
    wide_model: WideModel, wide_packed: WideModel, tmp_path: Path, architecture: str
) -> None:
    packed = wide_packed(architecture)
    expected = load_model(architecture, packed)
    expected.save_pretrained(tmp_path / "expected")
    model = load_model(architecture, packed, quantization_config=KEPT)
    large = {name for name, it in expected.named_parameters() if it.ndim > 1 and it.nbytes >= 65536}
    assert large - packed_names(model) == set()
    assert_same(model, expected)
    model.save_pretrained(tmp_path / "saved")
    assert_saved_alike(tmp_path)
    pruned = load_model(architecture, wide_model(architecture), quantization_config=KEPT)
    assert packed_names(pruned) == packed_names(model)
    assert_same(pruned, expected)


def test_a_rest_that_is_plain_stays_plain(wide_packed: WideModel, wide_model: WideModel) -> None:
    asked = EmpConfig(keep_packed=True, rest="plain")
    for folder in (wide_packed("llama", rest="plain"), wide_model("llama")):
        model = load_model("llama", folder, quantization_config=asked)
        assert packed_names(model) == set(EXPECTED["llama"].mlp)


def test_a_packed_model_takes_the_memory_of_its_planes(wide_packed: WideModel) -> None:
    packed = wide_packed("llama")
    model = load_model("llama", packed, quantization_config=KEPT)
    stored = sum(tensor.nbytes for tensor in load(packed).values())
    assert model.get_memory_footprint(return_buffers=False) == stored
    assert model.num_parameters() == load_model("llama", packed).num_parameters()


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "mixtral", "gpt-oss"])
def test_densify_unpacks_in_place(
    pruned_model: TinyModel, tmp_path: Path, architecture: str
) -> None:
    packed = pruned_model(architecture)
    model = load_model(architecture, packed, quantization_config=KEPT)
    expected = densify(load_model(architecture, packed))
    assert densify(model) is model
    assert packed_names(model) == set()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert differing(state(model), state(expected)) == []
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path / "saved")
    expected.save_pretrained(tmp_path / "expected")
    assert_saved_alike(tmp_path)


@pytest.mark.parametrize("asked", [{}, {"beta": 0.5}, {"targets": "attention"}], ids=str)
def test_a_rule_may_be_left_out_or_be_that_of_the_checkpoint(
    tiny_model: TinyModel, tmp_path: Path, asked: dict[str, Any]
) -> None:
    prune(tiny_model("llama"), tmp_path / "packed", PruneOptions(**asked))
    for rule in ({}, asked):
        config = EmpConfig(**rule, keep_packed=True)
        model = load_model("llama", tmp_path / "packed", quantization_config=config)
        assert packed_names(model)
    other = EmpConfig(beta=0.25, keep_packed=True)
    with pytest.raises(OptionError, match=r"beta is 0.25, .* packed already, with .*: leave beta"):
        load_model("llama", tmp_path / "packed", quantization_config=other)


def test_a_cpu_that_multiplies_slowly_is_told_of_once(
    pruned_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pruned_model("llama", torch.float16)
    keeping._warn_if_slow.cache_clear()
    monkeypatch.setattr(keeping, "has_fast_products", lambda _: False)
    with pytest.warns(UserWarning, match=r"no AVX-512 VBMI2: .* slower than a dense one") as told:
        load_model("llama", packed, quantization_config=KEPT)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model("llama", packed, quantization_config=KEPT)
    keeping._warn_if_slow.cache_clear()
