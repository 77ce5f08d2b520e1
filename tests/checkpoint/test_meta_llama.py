"""Meta's original Llama checkpoints become what transformers calls a Llama, as they stream."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.arriving import weights
from support.checkpoints import Tensors, differing, files, load, refusal
from support.hub_server import HubServer
from support.original_llamas import (
    DIM,
    HALF,
    HEADS,
    LAYERS,
    meta_logits,
    params,
    split,
    whole_model,
    write_original,
)
from support.original_llamas import F as WIDE
from support.original_llamas import V as VOCABULARY
from transformers import LlamaForCausalLM

from emp_llm import PruneOptions, inspect, prune, verify
from emp_llm.checkpoint.meta_llama.params import OriginalParams

NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTER = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
ROPE_3_1 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def turned(matrix: torch.Tensor) -> torch.Tensor:
    """Queries or keys with the rows of each head as transformers has them, one by one."""
    rows = list(matrix)
    order = []
    for first in range(0, len(rows), 2 * HALF):
        order += [first + 2 * pair for pair in range(HALF)]
        order += [first + 2 * pair + 1 for pair in range(HALF)]
    return torch.stack([rows[row] for row in order])


def in_new_layout(tensors: Tensors) -> Tensors:
    """A model in one part, under transformers' names."""
    found = {f"{new}.weight": tensors[f"{old}.weight"] for old, new in OUTER.items()}
    for layer in range(LAYERS):
        for old, new in NAMES.items():
            tensor = tensors[f"layers.{layer}.{old}.weight"]
            tensor = turned(tensor) if old in ("attention.wq", "attention.wk") else tensor
            found[f"model.layers.{layer}.{new}.weight"] = tensor
    return found


def written(folder: Path, out: Path) -> Tensors:
    """A checkpoint as it is written with zeros in one matrix of its 2 × 7."""
    prune(folder, out, PruneOptions(output_format="dense", targets=r"layers\.0\.mlp\.up_proj"))
    return load(out)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kv_heads", [HEADS, 4])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_become_one_model_under_transformers_names(
    tmp_path: Path, parts: int, kv_heads: int, zipped: bool
) -> None:
    whole = whole_model(kv_heads)
    fields = params(None if kv_heads == HEADS else kv_heads)
    source = write_original(tmp_path / "llama", fields, *split(whole, parts), zipped=zipped)
    pruned = {"model.layers.0.mlp.up_proj.weight"}
    assert set(differing(written(source, tmp_path / "out"), in_new_layout(whole))) == pruned


def test_embeddings_that_were_split_by_rows_are_joined_by_rows(tmp_path: Path) -> None:
    whole = whole_model()
    parts = split(whole, 2, embedding_axis=0)
    source = write_original(tmp_path / "llama", params(rope_theta=500_000.0), *parts)
    found = written(source, tmp_path / "out")
    assert found["model.embed_tokens.weight"].equal(whole["tok_embeddings.weight"])


@pytest.mark.parametrize(("parts", "kv_heads"), [(1, HEADS), (2, 4), (4, 4)])
def test_the_model_predicts_what_metas_own_does(tmp_path: Path, parts: int, kv_heads: int) -> None:
    """Pruned, so that the file is ours; Meta's model gets the pruned weights under its names."""
    whole = whole_model(kv_heads, torch.float32)
    source = write_original(tmp_path / "llama", params(kv_heads), *split(whole, parts))
    prune(source, tmp_path / "out", PruneOptions(output_format="dense"))
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.dtype == torch.float32
    found = load(tmp_path / "out")
    for layer in range(LAYERS):
        for old in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"):
            pruned = found[f"model.layers.{layer}.{NAMES[old]}.weight"]
            assert 0.3 < (pruned == 0).float().mean() < 0.45
            whole[f"layers.{layer}.{old}.weight"] = pruned
    tokens = torch.randint(0, VOCABULARY, (17,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens[None]).logits[0]
    expected = meta_logits(whole, tokens, kv_heads, 10_000.0)
    # float32 on both sides; rows in another order would make it as large as the spread
    assert (logits - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("output_format", ["packed", "dense"])
def test_pruning_it_gives_the_files_that_pruning_the_converted_model_gives(
    tmp_path: Path, output_format: str
) -> None:
    whole = whole_model(4)
    source = write_original(tmp_path / "llama", params(4), *split(whole, 2))
    options = PruneOptions(output_format=output_format)
    prune(source, tmp_path / "out", options)
    converted = tmp_path / "converted"
    converted.mkdir()
    save_file(in_new_layout(whole), converted / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config.pop("quantization_config", None)
    (converted / "config.json").write_text(json.dumps(config))
    generation = (tmp_path / "out" / "generation_config.json").read_bytes()
    (converted / "generation_config.json").write_bytes(generation)
    prune(converted, tmp_path / "expected", options)
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")
    assert verify(tmp_path / "out")["pruned_tensors"] == 3 * LAYERS


def test_large_models_are_dealt_out_to_shards_with_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = whole_model()
    source = write_original(tmp_path / "llama", params(), *split(whole, 2))
    single = written(source, tmp_path / "single")
    monkeypatch.setattr("emp_llm.checkpoint.meta_llama.original.MAX_SHARD_BYTES", 20_000)
    assert differing(written(source, tmp_path / "out"), single) == []
    names = [path.name for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert names == [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    assert max((tmp_path / "out" / name).stat().st_size for name in names) < 24_000
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == single.keys()
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == LAYERS


def test_what_lies_beside_the_parts_is_carried_along_but_for_what_tells_of_them(
    tmp_path: Path,
) -> None:
    source = write_original(tmp_path / "llama", params(), whole_model())
    for name in ("LICENSE.txt", "checklist.chk", "tokenizer.json"):
        (source / name).write_text("{}")
    prune(source, tmp_path / "out")
    made = {"config.json", "generation_config.json", "model.safetensors"}
    ours = {"README.md", "emp_report.json", "emp_report.svg"}
    assert files(tmp_path / "out").keys() - ours == made | {"LICENSE.txt", "tokenizer.json"}


def test_an_output_head_that_is_the_embedding_is_tied(tmp_path: Path) -> None:
    whole = whole_model()
    whole["output.weight"] = whole["tok_embeddings.weight"]
    source = write_original(tmp_path / "llama", params(), whole)
    assert "lm_head.weight" not in written(source, tmp_path / "out")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_hugging_faces_layout_comes_first(tmp_path: Path) -> None:
    folder = write_original(tmp_path / "both", params(), whole_model())
    prune(folder, tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert "the checkpoint is packed" in refusal(folder, tmp_path / "again")


SIZES = {"intermediate": WIDE, "vocabulary": VOCABULARY, "dtype": "bfloat16", "tied": False}
LLAMA_2_7B = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5}
LLAMA_2_70B = {
    "dim": 8192,
    "multiple_of": 4096,
    "ffn_dim_multiplier": 1.3,
    "n_heads": 64,
    "n_kv_heads": 8,
    "n_layers": 80,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}
LLAMA_3_8B = {**LLAMA_2_7B, "n_kv_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256}
LLAMA_3_2_1B = {**LLAMA_3_8B, "dim": 2048, "n_layers": 16, "use_scaled_rope": True}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (LLAMA_2_7B, {"max_position_embeddings": 4096, "num_key_value_heads": 32}),
        ({**LLAMA_2_7B, "norm_eps": 1e-6}, {"max_position_embeddings": 2048, "rope_theta": 1e4}),
        (LLAMA_2_70B, {"max_position_embeddings": 4096, "num_key_value_heads": 8}),
        ({**LLAMA_2_7B, "rope_theta": 1e6}, {"max_position_embeddings": 16384, "rope_theta": 1e6}),
        (LLAMA_3_8B, {"max_position_embeddings": 8192, "bos_token_id": 128000}),
        ({"model": LLAMA_3_8B}, {"max_position_embeddings": 8192, "eos_token_id": 128001}),
        (
            {**LLAMA_3_8B, "use_scaled_rope": True},
            {"max_position_embeddings": 131072, "rope_scaling": ROPE_3_1},
        ),
        (LLAMA_3_2_1B, {"hidden_size": 2048, "rope_scaling": {**ROPE_3_1, "factor": 32.0}}),
    ],
)
def test_params_of_published_models_become_their_published_configs(
    fields: dict, expected: dict
) -> None:
    config = OriginalParams.of(fields).config(**SIZES)
    assert {name: config.get(name) for name in expected} == expected
    assert ("rope_scaling" in config) == ("rope_scaling" in expected)
    assert config["model_type"] == "llama"


def changed(number: int, name: str, tensor: torch.Tensor | None) -> list[Tensors]:
    parts = split(whole_model(), 2)
    if tensor is None:
        del parts[number][name]
    else:
        parts[number][name] = tensor
    return parts


WQ = "layers.0.attention.wq.weight"
BAD_PARTS = {
    "a missing tensor": (changed(1, WQ, None), "consolidated.01.pth: lacks 'layers.0.attention.wq"),
    "another shape": (
        changed(1, WQ, torch.ones(DIM // 2, DIM - 1)),
        "consolidated.01.pth: 'layers.0.attention.wq.weight' is F32 [16, 31]; by params.json",
    ),
    "another dtype": (
        changed(1, WQ, torch.ones(DIM // 2, DIM)),
        "must be BF16 [16, 32]: the parts do not belong together",
    ),
    "experts": (
        changed(0, "layers.0.feed_forward.experts.w1.weight", torch.ones(2)),
        "has 'layers.0.feed_forward.experts.w1.weight', which the dense Llama",
    ),
    "a vision model": (
        [{"vision_model.class_embedding": torch.ones(2)}],
        "consolidated.00.pth: has 'vision_model.class_embedding', which the dense Llama",
    ),
    "a layer too many": (
        changed(0, f"layers.{LAYERS}.attention_norm.weight", torch.ones(DIM)),
        f"has 'layers.{LAYERS}.attention_norm.weight', which the dense Llama",
    ),
    "too many parts": ([whole_model()] * 16, "8 heads and 8 key/value heads cannot be divided"),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_parts_of_no_dense_llama_are_refused(tmp_path: Path, case: str) -> None:
    parts, reason = BAD_PARTS[case]
    source = write_original(tmp_path / "llama", params(), *parts)
    assert reason in refusal(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dim": None}, "dim is None; for a dense Llama it must be a whole number from 1"),
        ({"n_heads": 5}, "dim is 32; for a dense Llama it must be an even number for each of 5"),
        ({"n_kv_heads": 3}, "n_kv_heads is 3; for a dense Llama it must be a divisor of 8 heads"),
        ({"norm_eps": "x"}, "norm_eps is 'x'; for a dense Llama it must be a number above 0"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"model": 3}, "model is 3; for a dense Llama it must be an object"),
    ],
)
def test_impossible_params_are_refused(tmp_path: Path, fields: dict, reason: str) -> None:
    source = write_original(tmp_path / "llama", {**params(), **fields}, whole_model())
    assert f"params.json: {reason}" in refusal(source, tmp_path / "out")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    source = write_original(tmp_path / "llama", params(), *split(whole_model(), 2))
    (source / "consolidated.00.pth").rename(tmp_path / "00")
    assert "no consolidated.00.pth (1 of 2 parts missing)" in refusal(source, tmp_path / "out")
    (source / "consolidated.01.pth").unlink()
    assert "no consolidated.00.pth (1 of 1 parts missing)" in refusal(source, tmp_path / "out")
    (tmp_path / "00").rename(source / "consolidated.00.pth")
    (source / "params.json").unlink()
    assert "no params.json, which belongs to it" in refusal(source, tmp_path / "out")


@pytest.mark.parametrize("discard_source", [True, False])
def test_an_original_llama_of_the_hub_is_pruned_as_a_local_one(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, discard_source: bool
) -> None:
    monkeypatch.setattr("emp_llm.checkpoint.meta_llama.original.MAX_SHARD_BYTES", 20_000)
    folder = write_original(tmp_path / "llama", params(4), *split(whole_model(4), 2))
    hub.commit("meta-llama/tiny", files(folder))
    prune(folder, tmp_path / "expected")
    prune("meta-llama/tiny", tmp_path / "out", discard_source=discard_source)
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")
    assert [name for name in hub.downloads() if name.endswith(".pth")] == [
        f"consolidated.0{i}.pth" for i in (0, 1)
    ]
    left = list((tmp_path / "hub").rglob("consolidated.*.pth")) or [
        path for path in tmp_path.rglob("snapshots/*/consolidated.*.pth") if path.exists()
    ]
    assert len(left) == (0 if discard_source else 2)


def test_meta_files_of_the_hub_are_left_where_hugging_faces_are(
    tmp_path: Path, hub: HubServer
) -> None:
    folder = write_original(tmp_path / "llama", params(), whole_model())
    prune(folder, tmp_path / "dense", PruneOptions(output_format="dense"))
    original = {f"original/{name}": content for name, content in files(folder).items()}
    hub.commit("me/model", {**files(tmp_path / "dense"), **original, **files(folder)})
    assert inspect("me/model")["totals"]["targets"]["tensors"] == 3 * LAYERS
    assert not [name for name in hub.downloads() if name.endswith(".pth")]
