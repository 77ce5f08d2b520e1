"""Models of which what is not pruned is packed too: loaded, placed, trained and saved again."""

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from support.checkpoints import bits, differing, load
from support.fine_tuning import lost_zeros, make_trainer
from support.loading import load_model, logits, state
from support.wide_models import (
    EMBED,
    HEAD,
    WIDE,
    Q,
    WideModel,
    large,
    noise,
    planes_of,
    save_wide_model,
    with_odd_values,
)
from transformers import AutoModel, PreTrainedModel

from emp_llm import (
    EmpConfig,
    KeepSparsity,
    OptionError,
    PruneOptions,
    SparsityHold,
    densify,
    pack,
    prune,
    verify,
)

UP = "model.layers.0.mlp.up_proj.weight"


def assert_same(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    assert differing(state(found), state(expected)) == []
    assert torch.equal(logits(found), logits(expected))


@pytest.fixture(params=WIDE)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_packed_model_is_its_source_and_is_saved_to_the_same_planes(
    wide_model: WideModel, wide_packed: WideModel, tmp_path: Path, architecture: str
) -> None:
    source, packed = wide_model(architecture), wide_packed(architecture, targets="none")
    model = load_model(architecture, packed)
    assert_same(model, load_model(architecture, source))
    model.save_pretrained(tmp_path / "saved")
    assert differing(load(tmp_path / "saved"), load(packed)) == []
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == json.loads(
        (packed / "config.json").read_text()
    )
    checked = verify(tmp_path / "saved", against=source)
    assert (checked["tensors"], checked["pruned_tensors"]) == (len(load(source)), 0)


@pytest.mark.parametrize("rest", ["packed", "plain"])
def test_a_pruned_model_is_saved_to_the_planes_that_prune_writes(
    wide_model: WideModel, wide_packed: WideModel, tmp_path: Path, architecture: str, rest: str
) -> None:
    packed = wide_packed(architecture, rest=rest)
    load_model(architecture, packed).save_pretrained(tmp_path / "saved")
    assert differing(load(tmp_path / "saved"), load(packed)) == []
    asked = EmpConfig(rest=rest)
    while_loading = load_model(architecture, wide_model(architecture), quantization_config=asked)
    while_loading.save_pretrained(tmp_path / "as loaded")
    assert differing(load(tmp_path / "as loaded"), load(packed)) == []
    for name in ("saved", "as loaded"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["quantization_config"]["format_version"] == (2 if rest == "packed" else 1)


def test_a_model_loaded_to_prune_nothing_is_packed_when_it_is_saved(
    wide_model: WideModel, wide_packed: WideModel, tmp_path: Path
) -> None:
    asked = EmpConfig(targets="none")
    load_model("llama", wide_model("llama"), quantization_config=asked).save_pretrained(tmp_path)
    assert differing(load(tmp_path), load(wide_packed("llama", targets="none"))) == []


def test_a_model_too_small_to_pack_is_saved_as_an_ordinary_one(tmp_path: Path, tiny_model) -> None:
    source = tiny_model("llama")
    report = pack(source, tmp_path / "out")
    assert report["totals"]["model"]["bytes_ratio"] == 1.0
    verify(tmp_path / "out", against=source)
    model = load_model("llama", tmp_path / "out")
    with pytest.warns(UserWarning, match="none of the parameters that were pruned or packed is"):
        model.save_pretrained(tmp_path / "saved")
    assert differing(load(tmp_path / "saved"), load(source)) == []
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in config


def test_a_model_that_packing_makes_no_smaller_is_saved_and_proved(
    tmp_path: Path, wide_model: WideModel
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text((wide_model("llama") / "config.json").read_text())
    tensors = load(wide_model("llama"))
    tensors |= {name: noise(*tensors[name].shape) for name in large(tensors)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    pack(source, tmp_path / "out")
    load_model("llama", tmp_path / "out").save_pretrained(tmp_path / "saved")
    assert differing(load(tmp_path / "saved"), tensors) == []
    checked = verify(tmp_path / "saved", against=source)
    assert (checked["hashes"], checked["pruned_tensors"]) == (False, 0)


def test_odd_values_and_noise_are_loaded_and_saved_bit_for_bit(
    wide_model: WideModel, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text((wide_model("llama") / "config.json").read_text())
    tensors = load(wide_model("llama"))
    tensors |= {EMBED: with_odd_values(tensors[EMBED]), HEAD: noise(512, 64)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for name, options in (("pruned", {}), ("lossless", {"targets": "none"})):
        prune(source, tmp_path / name, PruneOptions(**options))
        model = load_model("llama", tmp_path / name)
        found = state(model)
        assert bits(found[EMBED]) == bits(tensors[EMBED])
        assert bits(found[HEAD]) == bits(tensors[HEAD])
        model.save_pretrained(tmp_path / f"{name} saved")
        assert differing(load(tmp_path / f"{name} saved"), load(tmp_path / name)) == []
        verify(tmp_path / f"{name} saved", against=source)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "mixtral"], indirect=True)
@pytest.mark.parametrize("limit", [100_000, 300_000])
def test_a_model_on_the_disk_says_what_it_says_in_memory(
    wide_packed: WideModel, tmp_path: Path, architecture: str, limit: int
) -> None:
    packed = wide_packed(architecture)
    model = load_model(
        architecture,
        packed,
        device_map="auto",
        max_memory={"cpu": limit},
        offload_folder=tmp_path / "disk",
    )
    assert any(parameter.is_meta for parameter in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    assert differing(load(tmp_path / "saved"), load(packed)) == []
    assert torch.equal(logits(model), logits(load_model(architecture, packed)))


def test_a_device_map_of_the_processor_changes_nothing(wide_packed: WideModel) -> None:
    packed = wide_packed("llama")
    assert_same(load_model("llama", packed, device_map="cpu"), load_model("llama", packed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_another_dtype_is_that_of_every_weight_and_is_packed_as_it_is(
    wide_packed: WideModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    packed = wide_packed("llama")
    expected = {name: w.to(dtype) for name, w in state(load_model("llama", packed)).items()}
    model = load_model("llama", packed, dtype=dtype)
    assert differing(state(model), expected) == []
    model.save_pretrained(tmp_path)
    assert planes_of(large(load(packed)) | {EMBED, Q, HEAD}) <= load(tmp_path).keys()
    assert differing(state(load_model("llama", tmp_path)), expected) == []


@pytest.mark.filterwarnings("ignore:.*UNEXPECTED.*")
def test_a_part_of_a_model_is_loaded_saved_and_loaded_again(
    wide_packed: WideModel, tmp_path: Path
) -> None:
    whole = load_model("llama", wide_packed("llama"))
    part = AutoModel.from_pretrained(wide_packed("llama"))
    assert differing(state(part), state(whole.model)) == []
    part.save_pretrained(tmp_path)
    assert "embed_tokens.weight.emp_meta" in load(tmp_path)
    assert differing(state(AutoModel.from_pretrained(tmp_path)), state(part)) == []


def test_tied_embeddings_stay_tied_and_are_packed_once(
    wide_packed: WideModel, tmp_path: Path
) -> None:
    model = load_model("llama-tied", wide_packed("llama-tied"))
    with torch.no_grad():
        model.model.embed_tokens.weight[3] += 1
    model.save_pretrained(tmp_path)
    assert HEAD not in load(tmp_path)
    again = load_model("llama-tied", tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert differing(state(again), state(model)) == []


def test_shards_of_any_size_hold_the_same_planes(
    wide_model: WideModel, wide_packed: WideModel, tmp_path: Path
) -> None:
    load_model("llama", wide_packed("llama")).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert differing(load(tmp_path), load(wide_packed("llama"))) == []
    verify(tmp_path, against=wide_model("llama"))


def test_names_of_the_models_own_are_packed_too(wide_packed: WideModel, tmp_path: Path) -> None:
    model = load_model("mixtral", wide_packed("mixtral", targets="none"))
    model.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj.emp_meta" in load(tmp_path)
    assert_same(load_model("mixtral", tmp_path), model)


def test_a_model_that_was_made_ordinary_is_saved_plain(
    wide_packed: WideModel, tmp_path: Path
) -> None:
    model = load_model("llama", wide_packed("llama"))
    densify(model)
    model.save_pretrained(tmp_path)
    assert differing(load(tmp_path), state(model)) == []
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def with_zeros_in_attention(folder: Path) -> Path:
    """A model of which half the weights of a layer that is not pruned are zero."""
    source = save_wide_model(folder / "source", "llama", dtype=torch.float32)
    tensors = load(source)
    tensors[Q][:, ::2] = 0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    prune(source, folder / "packed")
    return folder / "packed"


def test_only_zeros_of_pruned_layers_are_held_in_training(tmp_path: Path) -> None:
    model = load_model("llama", with_zeros_in_attention(tmp_path))
    before = state(model)
    make_trainer(model, tmp_path / "run", [KeepSparsity()], save_strategy="no").train()
    lost = lost_zeros(before, state(model))
    assert lost[Q] > 0
    assert {name for name in lost if ".mlp." in name} == {n for n in before if ".mlp." in n}
    assert all(count == 0 for name, count in lost.items() if ".mlp." in name)
    model.save_pretrained(tmp_path / "saved")
    assert planes_of({Q, UP}) <= load(tmp_path / "saved").keys()
    assert differing(state(load_model("llama", tmp_path / "saved")), state(model)) == []


def test_a_lossless_model_has_no_zeros_to_hold(wide_packed: WideModel) -> None:
    model = load_model("llama", wide_packed("llama", targets="none"))
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(OptionError) as caught:
        SparsityHold(model)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_merged_into_layers_packed_whole(
    wide_packed: WideModel, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    base = load_model("llama", wide_packed("llama", targets="none"))
    before = state(base)
    merged = get_peft_model(base, config).merge_and_unload()
    assert {Q, UP} <= set(differing(state(merged), before))
    merged.save_pretrained(tmp_path)
    assert planes_of({Q, EMBED, HEAD}) <= load(tmp_path).keys()
    assert differing(state(load_model("llama", tmp_path)), state(merged)) == []


def test_loading_takes_little_memory_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emp_llm.tensors.geometry.ROW_BLOCK_BYTES", 1 << 18)
    sizes = {"vocab_size": 65_536, "hidden_size": 128, "num_hidden_layers": 1}
    save_wide_model(tmp_path / "source", "llama", **sizes)  # two tensors of 16.8 MB
    pack(tmp_path / "source", tmp_path / "packed")
    load_model("llama", tmp_path / "packed")  # whatever is made once
    tracemalloc.start()
    try:
        load_model("llama", tmp_path / "packed")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12e6  # of what numpy and Python take; the model itself is torch's
