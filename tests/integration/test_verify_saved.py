"""verify and diff of folders that save_pretrained wrote, which have no report."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.loading import load_model
from transformers import MarianConfig, MarianMTModel

from emp_llm import EmpConfig, FormatError, diff, verify

TinyModel = Callable[..., Path]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_what_was_pruned_while_loading_is_what_the_source_gives(
    tiny_model: TinyModel, pruned_model: TinyModel, tmp_path: Path, architecture: str
) -> None:
    source = tiny_model(architecture)
    model = load_model(architecture, source, quantization_config=EmpConfig())
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    found = verify(tmp_path, against=source)
    written = verify(pruned_model(architecture))
    assert not found["hashes"]
    assert [found[name] for name in ("rows", "kept")] == [written[n] for n in ("rows", "kept")]
    assert diff(tmp_path, pruned_model(architecture))["totals"]["same_masks"] == found["tensors"]


def with_every_name(source: Path, folder: Path, architecture: str) -> Path:
    """The same checkpoint, with tied weights stored under each of their names."""
    shutil.copytree(source, folder)
    state = load_model(architecture, source).state_dict()
    copies = {name: tensor.clone() for name, tensor in state.items()}
    save_file(copies, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("architecture", "tied"), [("llama-tied", 1), ("gpt2", 1), ("t5", 3), ("bert", 2)]
)
def test_tied_weights_that_the_source_has_twice_are_saved_once(
    tiny_model: TinyModel, tmp_path: Path, architecture: str, tied: int
) -> None:
    source = with_every_name(tiny_model(architecture), tmp_path / "source", architecture)
    model = load_model(architecture, source, quantization_config=EmpConfig())
    model.save_pretrained(tmp_path / "out")
    found = verify(tmp_path / "out", against=source)
    assert found["tensors"] == len(model.state_dict()) - tied
    assert len(diff(source, tmp_path / "out")["only_in_a"]) == tied


def test_what_the_model_has_no_place_for_is_not_missed(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_model("llama"), tmp_path / "source"))
    weights = load_file(source / "model.safetensors")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights | old, source / "model.safetensors", {"format": "pt"})
    model = load_model("llama", source, quantization_config=EmpConfig())
    model.save_pretrained(tmp_path / "out")
    assert verify(tmp_path / "out", against=source)["tensors"] == len(weights)


def test_what_the_model_computes_and_transformers_never_saves_is_not_missed(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "vocab_size": 32, "pad_token_id": 1, "max_position_embeddings": 8}
    parts = {
        f"{part}_{size}": 2 for part in ("encoder", "decoder") for size in ("layers", "ffn_dim")
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = MarianConfig(**sizes, **parts, **heads, decoder_start_token_id=1)
    made = MarianMTModel(config)
    made.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    torch.save(made.state_dict(), tmp_path / "source" / "pytorch_model.bin")
    model = MarianMTModel.from_pretrained(tmp_path / "source", quantization_config=EmpConfig())
    model.save_pretrained(tmp_path / "out")
    lost = diff(tmp_path / "source", tmp_path / "out")["only_in_a"]
    assert {name for name in lost if "embed_positions" in name} == {
        "model.decoder.embed_positions.weight",
        "model.encoder.embed_positions.weight",
    }
    assert verify(tmp_path / "out", against=tmp_path / "source")["pruned_tensors"] == 8


def test_a_tied_tensor_of_its_own_weights_is_missed(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = with_every_name(tiny_model("llama-tied"), tmp_path / "source", "llama-tied")
    model = load_model("llama-tied", source, quantization_config=EmpConfig())
    model.save_pretrained(tmp_path / "out")
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"][-1, -1] += 1
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"lacks tensor 'lm_head\.weight' of"):
        verify(tmp_path / "out", against=source)


def test_a_weight_that_changed_since_is_found_by_the_source(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model("llama")
    model = load_model("llama", source, quantization_config=EmpConfig())
    weight = model.model.layers[0].mlp.up_proj.weight
    row, column = weight.nonzero()[4].tolist()
    with torch.no_grad():
        weight[row, column] *= 2
    model.save_pretrained(tmp_path)
    assert verify(tmp_path)["kept"] > 0
    with pytest.raises(FormatError, match=f"up_proj.weight' row {row} column {column} is"):
        verify(tmp_path, against=source)
