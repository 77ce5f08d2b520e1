"""Models with fewer neurons and key-value heads, from option to report."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.calibrated import calibration, ids_of, save_text, save_tokenizer
from support.widths import make, mask
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from emp_llm import OptionError, ShrinkOptions, shrink, verify
from emp_llm.shrinking.narrowing import Narrowing


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    make("llama").save_pretrained(folder)
    return save_tokenizer(folder, 32)


def options(text: Path | None, **given: Any) -> ShrinkOptions:
    return ShrinkOptions(**{"calibration": calibration(text), "multiple": 8, **given})


def test_unrepaired_it_is_the_dense_model_with_those_masked(
    dense: Path, text: Path, tmp_path: Path
) -> None:
    asked = options(text, neurons="25%", kv_heads=2, repair="none")
    report = shrink(dense, tmp_path / "out", asked, threads=1)

    config = json.loads((tmp_path / "out/config.json").read_text())
    names = ("intermediate_size", "num_key_value_heads", "num_attention_heads", "head_dim")
    # 30 would be left, and 32 is the multiple of 8 next to it
    assert [config[name] for name in names] == [32, 2, 4, 8]
    model = make("llama")
    for kind, found in report["structures"].items():
        stays = {
            int(name.rpartition(".")[2]): one["kept"] for name, one in found["holders"].items()
        }
        assert stays.keys() == {0, 1}
        mask(model, stays, kind)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected, found_logits = (one(ids_of(text)).logits for one in (model, small))
    torch.testing.assert_close(found_logits, expected, rtol=0, atol=1e-5)
    assert not any(one.get("repaired") for one in report["tensors"].values())
    assert report["calibration"]["text"] == text.name


def test_repaired_matrices_are_named_and_nearer_to_the_dense_model(
    dense: Path, text: Path, tmp_path: Path
) -> None:
    ids, whole = ids_of(text), make("llama")
    distances = []
    for repair in ("none", "obs"):
        out = tmp_path / repair
        report = shrink(dense, out, options(text, neurons="40%", repair=repair), threads=1)
        small = AutoModelForCausalLM.from_pretrained(out)
        with torch.no_grad():
            distances.append((small(ids).logits - whole(ids).logits).norm().item())
    assert distances[1] < 0.9 * distances[0]
    repaired = {name for name, one in report["tensors"].items() if one.get("repaired")}
    assert repaired == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2)}
    assert verify(tmp_path / "none", against=dense)["repaired_tensors"] == 0
    assert verify(tmp_path / "obs", against=dense)["repaired_tensors"] == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"neurons": "5%"}, "neurons: 40 of them would stay, by multiples of 8, but the model has"),
        ({"neurons": 30}, "neurons: 30 is no multiple of 8"),
        ({"kv_heads": 3}, "kv heads: 3 of them are to stay, but the model has 3 kv heads"),
        ({"kv_heads": 2, "width_score": "best"}, "width score is 'best'"),
        ({"neurons": "25%", "multiple": 0}, "multiple is 0"),
        ({"neurons": "25%", "calibration": None}, "give a text to calibrate on"),
        ({"neurons": "auto"}, "neurons is auto: give the max loss increase too"),
    ],
)
def test_bad_amounts_are_refused_in_one_line(
    dense: Path, text: Path, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message) as error:
        shrink(dense, tmp_path / "out", options(text, **given))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("architecture", "first", "widths"),
    [
        ("qwen3-moe", {"experts": 3}, {"neurons": "25%", "kv_heads": 2}),
        ("gpt2", {"blocks": 1, "block_score": "random"}, {"neurons": "25%"}),
    ],
)
def test_what_is_chosen_beside_others_is_what_would_be_chosen_after_them(
    text: Path, tmp_path: Path, architecture: str, first: dict[str, Any], widths: dict[str, Any]
) -> None:
    make(architecture).save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense", 32)

    both = shrink(tmp_path / "dense", tmp_path / "both", options(text, **first, **widths))
    alone = options(None, **first)
    shrink(tmp_path / "dense", tmp_path / "first", alone)
    shrink(tmp_path / "first", tmp_path / "second", options(text, **widths))

    assert sum(one.get("repaired", False) for one in both["tensors"].values()) > 0
    name = "model.safetensors"
    found, expected = (load_file(tmp_path / folder / name) for folder in ("both", "second"))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("both", "second")]
    assert configs[0] == configs[1]


def mean_loss(model: PreTrainedModel, ids_NL: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(ids_NL).logits
    return float(cross_entropy(logits[:, :-1].reshape(-1, 32), ids_NL[:, 1:].reshape(-1)))


def test_auto_keeps_as_few_as_the_loss_of_the_repaired_model_allows(
    dense: Path, text: Path, tmp_path: Path
) -> None:
    ids = ids_of(text)
    asked = options(text, kv_heads="auto", max_loss_increase=0.3)
    report = shrink(dense, tmp_path / "out", asked, threads=1)
    assert report["calibration"]["text"] == text.name

    found = report["structures"]["kv heads"]
    losses = {one["number"]: one["loss"] for one in found["tried"]}
    whole = mean_loss(make("llama"), ids)
    assert losses.pop(None) == pytest.approx(whole, rel=1e-5)
    assert 2 in losses
    for number, loss in losses.items():
        given = options(text, kv_heads=number)
        shrink(dense, tmp_path / f"{number}", given, threads=1)
        small = AutoModelForCausalLM.from_pretrained(tmp_path / f"{number}")
        assert mean_loss(small, ids) == pytest.approx(loss, rel=1e-5)
    low_enough = [number for number, loss in losses.items() if loss <= 1.003 * whole]
    assert found["kept"] == min(low_enough, default=3)


def test_where_no_fewer_are_allowed_that_is_said_and_nothing_is_written(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Narrowing, "loss", lambda _self, change=None: 1.0 if not change else 2.0)
    asked = options(text, neurons="auto", max_loss_increase=50, multiple=24)
    with pytest.raises(
        OptionError, match=r"^neurons: none can go .* 50 per cent: with 24 it rises"
    ):
        shrink(dense, tmp_path / "out", asked, threads=1)
    assert not (tmp_path / "out").exists()
