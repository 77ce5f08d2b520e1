import contextlib
import gc
import json
import logging
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.architectures import ARCHITECTURES, make_model, pruned, read_tensors, with_config
from support.expected_targets import EXPECTED, GATED, LLAMA, experts, names
from support.processes import start

from emp_llm.errors import CheckpointError
from emp_llm.structure.places import find_places
from emp_llm.structure.targets import decide_targets


@pytest.fixture
def llama(tiny_model):
    return tiny_model("llama")


# Architectures


def test_every_architecture_has_its_expectation():
    assert EXPECTED.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("architecture", EXPECTED)
def test_mlp_prunes_the_linear_layers_of_blocks_outside_attention(architecture, tiny_model):
    folder = tiny_model(architecture)
    decisions = decide_targets(folder, read_tensors(folder))
    assert pruned(decisions) == set(EXPECTED[architecture].mlp)


@pytest.mark.parametrize("architecture", EXPECTED)
def test_attention_prunes_the_linear_layers_of_attention(architecture, tiny_model):
    folder = tiny_model(architecture)
    decisions = decide_targets(folder, read_tensors(folder), targets="attention")
    assert pruned(decisions) == set(EXPECTED[architecture].attention)


@pytest.mark.parametrize("architecture", EXPECTED)
def test_all_linear_prunes_both_and_names_each_layer(architecture, tiny_model):
    folder = tiny_model(architecture)
    expected = EXPECTED[architecture]
    decisions = decide_targets(folder, read_tensors(folder), targets="all-linear")
    chosen = [decision for decision in decisions.values() if decision.prune]
    assert pruned(decisions) == {*expected.mlp, *expected.attention}
    assert {decision.name for decision in chosen if decision.transposed} == {*expected.transposed}
    assert {decision.kind for decision in chosen} == {*expected.kinds}


def test_decisions_come_in_the_order_of_the_tensors(llama):
    tensors = dict(reversed(read_tensors(llama).items()))
    assert list(decide_targets(llama, tensors)) == list(tensors)


# Reasons, blocks, kinds


@pytest.mark.parametrize(
    ("architecture", "name", "reason"),
    [
        ("llama", "model.embed_tokens.weight", "embedding"),
        ("llama", "lm_head.weight", "lm_head"),
        ("llama", "model.norm.weight", "norm"),
        ("llama", "model.layers.0.self_attn.q_proj.weight", "attention (targets=mlp)"),
        ("llama", "model.layers.0.mlp.up_proj.weight", "linear layer outside attention"),
        ("gpt-neox", "embed_out.weight", "lm_head"),
        ("phi", "model.layers.0.mlp.fc1.bias", "bias"),
        ("roberta", "lm_head.dense.weight", "lm_head"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", "router"),
        (
            *("mixtral", "model.layers.0.block_sparse_moe.experts.3.w1.weight"),
            "linear layer of an expert",
        ),
        ("qwen2-moe", "model.layers.1.mlp.shared_expert_gate.weight", "router"),
        ("deepseek-v3", "model.layers.1.mlp.gate.weight", "router"),
        ("deepseek-v3", "model.layers.1.mlp.gate.e_score_correction_bias", "buffer"),
        ("gpt-oss", "model.layers.0.mlp.experts.gate_up_proj_bias", "bias"),
        ("gpt-oss", "model.layers.0.mlp.router.weight", "router"),
        ("gpt-oss", "model.layers.0.self_attn.sinks", "not a linear layer"),
        ("jamba", "model.layers.1.feed_forward.router.weight", "router"),
        ("jamba", "model.layers.0.mamba.conv1d.weight", "not a linear layer"),
        ("llava", "multi_modal_projector.linear_1.weight", "outside the blocks"),
        ("llava", "vision_tower.embeddings.patch_embedding.weight", "embedding"),
    ],
)
def test_each_decision_says_why(architecture, name, reason, tiny_model):
    folder = tiny_model(architecture)
    assert decide_targets(folder, read_tensors(folder))[name].reason == reason


def test_a_head_that_is_tied_says_to_what(tiny_model):
    folder = tiny_model("llama-tied")
    tensors = {**read_tensors(folder), "lm_head.weight": ("BF16", (32, 16))}
    decision = decide_targets(folder, tensors, targets=".")["lm_head.weight"]
    assert (decision.prune, decision.reason) == (False, "tied to model.embed_tokens.weight")


def test_a_tensor_that_the_model_does_not_have_is_left(llama):
    # As the layer for predicting several tokens, which transformers skips.
    tensors = {**read_tensors(llama), "model.layers.2.mlp.up_proj.weight": ("BF16", (24, 16))}
    decision = decide_targets(llama, tensors)["model.layers.2.mlp.up_proj.weight"]
    assert (decision.prune, decision.reason) == (False, "not part of the model")


@pytest.mark.parametrize(
    ("architecture", "name", "block"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", "model.layers.1"),
        ("gpt2", "transformer.h.1.mlp.c_fc.weight", "transformer.h.1"),
        ("bert", "bert.encoder.layer.1.output.dense.weight", "bert.encoder.layer.1"),
        ("t5", "decoder.block.0.layer.2.DenseReluDense.wi.weight", "decoder.block.0"),
        (
            "llava",
            "language_model.model.layers.1.input_layernorm.weight",
            "language_model.model.layers.1",
        ),
        ("llava", "vision_tower.encoder.layers.0.mlp.fc1.weight", "vision_tower.encoder.layers.0"),
        ("llama", "model.embed_tokens.weight", None),
        ("llama", "lm_head.weight", None),
    ],
)
def test_a_block_is_named_as_in_the_checkpoint(architecture, name, block, tiny_model):
    folder = tiny_model(architecture)
    assert decide_targets(folder, read_tensors(folder))[name].block == block


def test_what_is_no_linear_layer_is_named_by_its_module(llama):
    decisions = decide_targets(llama, read_tensors(llama))
    assert decisions["model.embed_tokens.weight"].kind == "embed_tokens"
    assert decisions["model.layers.0.input_layernorm.weight"].kind == "input_layernorm"


# Checkpoints whose names are not the model's


@pytest.mark.parametrize(
    ("architecture", "module"),
    [("mixtral", "mlp"), ("qwen3-moe", "mlp"), ("jamba", "feed_forward")],
)
def test_experts_in_one_tensor_are_pruned_as_well(architecture, module, tiny_model, tmp_path):
    state = {name: it.contiguous() for name, it in make_model(architecture).state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with_config(tmp_path, tiny_model(architecture))
    decisions = decide_targets(tmp_path, read_tensors(tmp_path))
    for leaf in ("gate_up_proj", "down_proj"):
        decision = decisions[f"model.layers.1.{module}.experts.{leaf}"]
        assert decision.prune
        assert not decision.transposed
        assert decision.kind == f"experts.{leaf}"


@pytest.mark.parametrize(("shape", "transposed"), [((2, 4, 6), True), ((2, 6, 4), False)])
def test_experts_lie_as_the_features_of_their_module_say(shape, transposed):
    fused = torch.nn.Module()  # as Aria's are in older transformers
    fused.in_features, fused.out_features = 4, 6
    fused.weight = torch.nn.Parameter(torch.empty(shape))
    # a class of its own: transformers notes on a class what its module says, and others inherit it
    model = type("Model", (transformers.PreTrainedModel,), {})(transformers.PretrainedConfig())
    model.experts = fused
    place = find_places(model)["experts.weight"]
    assert place.why_not is None
    assert place.transposed is transposed


def test_names_without_the_models_prefix_are_understood(tiny_model):
    folder = tiny_model("gpt2")
    tensors = {name.removeprefix("transformer."): it for name, it in read_tensors(folder).items()}
    decisions = decide_targets(folder, tensors)
    assert pruned(decisions) == {
        *("h.0.mlp.c_fc.weight", "h.0.mlp.c_proj.weight"),
        *("h.1.mlp.c_fc.weight", "h.1.mlp.c_proj.weight"),
    }
    assert decisions["h.1.mlp.c_fc.weight"].block == "h.1"
    assert decisions["h.1.mlp.c_fc.weight"].transposed


def test_a_prefix_that_the_model_does_not_have_is_understood(tiny_model, tmp_path):
    folder = with_config(tmp_path, tiny_model("bert"), architectures=["BertModel"])
    decisions = decide_targets(folder, read_tensors(tiny_model("bert")))
    assert pruned(decisions) == set(EXPECTED["bert"].mlp)
    assert decisions["cls.predictions.transform.dense.weight"].reason == "not part of the model"


def test_norms_of_old_checkpoints_are_known(tiny_model):
    folder = tiny_model("bert")
    tensors = read_tensors(folder)
    name = "bert.encoder.layer.0.output.LayerNorm."
    tensors = {key: it for key, it in tensors.items() if not key.startswith(name)}
    tensors |= {name + "gamma": ("BF16", (16,)), name + "beta": ("BF16", (16,))}
    decisions = decide_targets(folder, tensors)
    assert decisions[name + "gamma"].reason == "norm"
    assert decisions[name + "beta"].reason == "norm"


def test_a_tower_that_transformers_renames_keeps_the_checkpoints_block(tiny_model):
    folder = tiny_model("llava")
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): it
        for name, it in read_tensors(folder).items()
    }
    decision = decide_targets(folder, tensors)[
        "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"
    ]
    assert decision.prune
    assert decision.block == "vision_tower.vision_model.encoder.layers.1"


@pytest.mark.parametrize("as_on_the_hub", [True, False])
def test_a_tensor_that_is_swapped_on_loading_is_transposed_before(as_on_the_hub, tmp_path):
    config = transformers.Qwen3VLMoeConfig(
        architectures=["Qwen3VLMoeForConditionalGeneration"],
        text_config={
            "hidden_size": 16,
            "moe_intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_experts": 4,
            "vocab_size": 32,
        },
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16},
    )
    config.save_pretrained(tmp_path)
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    shape = (4, 8, 16) if as_on_the_hub else (4, 16, 8)  # the Hub's lie [expert, in, out]
    tensors = {name: ("BF16", shape), "model.visual.blocks.0.norm1.weight": ("BF16", (16,))}
    decision = decide_targets(tmp_path, tensors)[name]
    assert decision.prune
    assert decision.transposed is as_on_the_hub


def test_a_config_without_architectures_is_built_as_automodel_does(llama, tmp_path):
    folder = with_config(tmp_path, llama, architectures=None)
    decisions = decide_targets(folder, read_tensors(llama))
    assert pruned(decisions) == set(LLAMA.mlp)
    assert decisions["lm_head.weight"].reason == "not part of the model"


def test_an_architecture_that_is_no_model_is_passed_over(llama, tmp_path):
    folder = with_config(tmp_path, llama, architectures=["Trainer", "LlamaForCausalLM"])
    assert pruned(decide_targets(folder, read_tensors(llama))) == set(LLAMA.mlp)


def test_deepseek_v3_at_its_full_size_is_decided(tmp_path):
    config = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {
        f"model.layers.{layer}.mlp.experts.{expert}.{leaf}.weight": ("BF16", shape)
        for layer in range(3, 62)
        for expert in range(256)
        for leaf, shape in zip(GATED, [(2048, 7168)] * 2 + [(7168, 2048)], strict=True)
    }
    decisions = decide_targets(tmp_path, tensors)
    # Layer 61, which predicts a second token, is not part of the model.
    assert len(pruned(decisions)) == 58 * 256 * 3


# Regular expressions


def test_a_regular_expression_is_searched_in_the_checkpointsnames(tiny_model):
    folder = tiny_model("mixtral")
    decisions = decide_targets(folder, read_tensors(folder), targets=r"layers\.1\..*\.w2\.")
    assert pruned(decisions) == set(experts("model.layers.1.block_sparse_moe.experts.{}.", "w2"))
    other = decisions["model.layers.0.block_sparse_moe.experts.0.w2.weight"]
    assert other.reason == "not matched by the targets"


def test_a_regular_expression_reaches_linear_layers_outside_blocks(tiny_model):
    folder = tiny_model("llava")
    decisions = decide_targets(folder, read_tensors(folder), targets="projector")
    assert pruned(decisions) == {
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.weight",
    }


@pytest.mark.parametrize("architecture", EXPECTED)
def test_a_regular_expression_for_everything_reaches_linear_layers_only(architecture, tiny_model):
    outside = {
        "bert": names("cls.predictions.transform.", "dense"),
        "llava": names("multi_modal_projector.", "linear_1", "linear_2"),
    }
    folder = tiny_model(architecture)
    expected = EXPECTED[architecture]
    decisions = decide_targets(folder, read_tensors(folder), targets=".")
    assert pruned(decisions) == {
        *expected.mlp,
        *expected.attention,
        *outside.get(architecture, []),
    }


def test_ignore_takes_away(llama):
    decisions = decide_targets(llama, read_tensors(llama), ignore=["down_proj", r"layers\.0\."])
    assert pruned(decisions) == set(names("model.layers.1.mlp.", "gate_proj", "up_proj"))
    reason = decisions["model.layers.1.mlp.down_proj.weight"].reason
    assert reason == "ignored by --ignore 'down_proj'"


# What it leaves behind


def test_it_prints_nothing(llama, tmp_path):
    # transformers warns of this config: its rope scaling contradicts itself.
    rope = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
    folder = with_config(tmp_path, llama, rope_parameters={**rope, "rope_theta": 10000.0})
    shapes = {f"model.layers.{n}.mlp.up_proj.weight": ("BF16", (24, 16)) for n in (0, 1)}
    process = start(decide_targets, folder, shapes, output=tmp_path / "printed")
    process.join(60)
    assert process.exitcode == 0
    assert (tmp_path / "printed").read_text() == ""


@pytest.mark.parametrize("targets", ["mlp", "nothing of this name"])
def test_it_leaves_logging_and_garbage_collection_as_they_were(targets, llama):
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_info()
    try:
        with contextlib.suppress(CheckpointError):
            decide_targets(llama, read_tensors(llama), targets=targets)
        assert transformers.logging.get_verbosity() == logging.INFO
        assert gc.isenabled()
    finally:
        transformers.logging.set_verbosity(verbosity)


def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys, emp_llm.structure.targets; "
        "print(*({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""
