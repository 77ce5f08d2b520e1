"""Adapters merged into a pruned model: kept weights get what they add, pruned ones stay +0.0."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from support.architectures import make_model
from support.checkpoints import Tensors, bits, differing
from support.fine_tuning import lost_zeros, make_trainer, pruned_model
from support.loading import load_model, state

from emp_llm import (
    KeepSparsity,
    OptionError,
    PruneOptions,
    SparsityHold,
    densify,
    merge_adapter,
    prune,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft asks transformers
)

FP32, BF16 = torch.float32, torch.bfloat16

CASES = {
    "llama": {"target_modules": ["up_proj", "down_proj", "q_proj"]},
    "gpt2": {"target_modules": ["c_fc", "mlp.c_proj"], "fan_in_fan_out": True},
    "mixtral": {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
}


def with_adapter(model, architecture="llama", **options) -> PeftModel:
    """A model with an adapter that already adds something."""
    torch.manual_seed(0)
    given = {"init_lora_weights": False, **CASES[architecture], **options}
    return get_peft_model(model, LoraConfig(r=3, lora_alpha=6, **given))


def added(model: PeftModel, adapter: str = "default") -> Tensors:
    """What an adapter adds, in float64, by the parameter it adds it to; 6 / 3 is its scaling."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if adapter not in getattr(module, "lora_A", {}):
            continue
        first = module.lora_A[adapter].weight.detach().double()
        second = module.lora_B[adapter].weight.detach().double()
        if hasattr(module, "parameter_name"):
            experts = getattr(module.get_base_layer(), module.parameter_name).shape[0]
            rank = len(first) // experts
            parts = [
                second[:, e::experts] @ first[e * rank : (e + 1) * rank] for e in range(experts)
            ]
            delta, leaf = torch.stack(parts), module.parameter_name
        else:
            delta, leaf = second @ first, "weight"
            if type(module.get_base_layer()).__name__ == "Conv1D":
                delta = delta.T
        found[f"{name.replace('.base_layer', '')}.{leaf}"] = 6 / 3 * delta
    return found


def expected(before: Tensors, *deltas: Tensors) -> Tensors:
    """The pruned model with deltas added to what was kept of MLPs, and to all of the others."""
    result = {}
    for name, was in before.items():
        total = sum((delta[name] for delta in deltas if name in delta), was.double())
        pruned = (was == 0) & ("mlp" in name and was.ndim > 1)
        result[name] = torch.where(pruned, 0.0, total)
    return result


def check(found: Tensors, wanted: Tensors, tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", FP32), ("llama", BF16), ("gpt2", FP32), ("mixtral", FP32)],
)
def test_kept_weights_get_what_the_adapter_adds(tiny_model, architecture, dtype, safe_merge):
    model = pruned_model(architecture, tiny_model(architecture), dtype=dtype)
    before = state(model)
    adapted = with_adapter(model, architecture)
    deltas = added(adapted)
    merged = merge_adapter(adapted, safe_merge=safe_merge)
    assert merged is model
    after = state(merged)
    check(after, expected(before, deltas), 1e-6 if dtype == FP32 else 2**-7)
    assert not any(lost_zeros({name: before[name] for name in deltas}, after).values())
    changed = {name for name in before if bits(before[name]) != bits(after[name])}
    assert changed == set(deltas)
    assert any("mlp" in name for name in changed)


def test_without_it_peft_fills_the_zeros(tiny_model):
    model = pruned_model("llama", tiny_model("llama"))
    before = state(model)
    merged = with_adapter(model).merge_and_unload()
    lost = lost_zeros(before, state(merged))
    assert sum(count > 0 for count in lost.values()) == 4  # up and down in two layers


@pytest.mark.parametrize("architecture", CASES)
def test_a_merged_model_is_saved_packed_and_comes_back(tiny_model, tmp_path, architecture):
    model = pruned_model(architecture, tiny_model(architecture))
    merged = merge_adapter(with_adapter(model, architecture))
    merged.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "emp"
    assert differing(state(load_model(architecture, tmp_path)), state(merged)) == []


def test_adapters_are_trained_and_merged_without_losing_a_zero(tiny_model, tmp_path):
    model = pruned_model("llama", tiny_model("llama"), dtype=FP32)
    before = state(model)
    adapted = with_adapter(model, init_lora_weights=True, modules_to_save=["gate_proj"])
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = make_trainer(adapted, tmp_path, [KeepSparsity()], **arguments)
    trainer.train()
    deltas = added(adapted)
    assert all(delta.any() for delta in deltas.values())
    name = "model.layers.0.mlp.gate_proj.weight"
    copy = adapted.base_model.model.model.layers[0].mlp.gate_proj.modules_to_save["default"].weight
    trained = copy.detach().clone()
    assert (trained[before[name] == 0] == 0).all()
    assert (trained != before[name]).any()

    after = state(merge_adapter(adapted))
    assert not any(lost_zeros(before, after).values())
    assert torch.equal(after[name], trained)
    del after[name], after[name.replace("0", "1")]
    check(after, {name: expected(before, deltas)[name] for name in after}, 1e-6)


def test_a_saved_copy_that_lost_its_zeros_gets_them_back(tiny_model):
    model = pruned_model("llama", tiny_model("llama"))
    before = state(model)
    adapted = with_adapter(model, modules_to_save=["gate_proj"])
    for name, weights in adapted.named_parameters():
        if "modules_to_save" in name:
            weights.data += 1
    after = state(merge_adapter(adapted))
    name = "model.layers.1.mlp.gate_proj.weight"
    wanted = torch.where(before[name] == 0, 0, before[name] + 1)
    assert differing({name: after[name]}, {name: wanted}) == []


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (None, ["default"]),
        ("other", ["other"]),
        (["other"], ["other"]),
        (["default", "other"], ["default", "other"]),
    ],
)
def test_the_named_adapters_are_merged(tiny_model, names, taken):
    model = pruned_model("llama", tiny_model("llama"), dtype=FP32)
    before = state(model)
    adapted = with_adapter(model)
    more = LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_modules=["gate_proj"])
    adapted.add_adapter("other", more)
    deltas = {name: added(adapted, name) for name in ("default", "other")}
    assert deltas["other"].keys() != deltas["default"].keys()
    after = state(merge_adapter(adapted, adapter_names=names))
    check(after, expected(before, *(deltas[name] for name in taken)), 1e-6)


def test_a_dense_checkpoint_is_merged_by_the_names_of_what_was_pruned(tiny_model):
    model = densify(pruned_model("llama", tiny_model("llama")))
    before = state(model)
    with pytest.raises(OptionError, match="name the pruned parameters"):
        merge_adapter(with_adapter(model))
    model = densify(pruned_model("llama", tiny_model("llama")))
    merged = merge_adapter(with_adapter(model), parameters="mlp")
    assert not any(lost_zeros(before, state(merged)).values())


def test_expressions_choose_pruned_weights_and_not_those_of_adapters(tiny_model):
    adapted = with_adapter(pruned_model("llama", tiny_model("llama")), init_lora_weights=True)
    for weights in adapted.parameters():
        weights.requires_grad_()
    hold = SparsityHold(adapted, parameters="down_proj")
    for name, weights in adapted.named_parameters():
        if "lora_B" in name:  # all zeros in the beginning
            weights.data += 1
    hold.apply()
    for name, weights in adapted.named_parameters():
        assert "lora_B" not in name or (weights == 1).all()


def test_a_broken_adapter_leaves_the_zeros_where_they_were(tiny_model):
    model = pruned_model("llama", tiny_model("llama"))
    before = state(model)
    adapted = with_adapter(model)
    adapted.get_parameter(BROKEN).data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        merge_adapter(adapted, safe_merge=True)
    weights = model.model.layers[0].mlp.up_proj.weight  # merged before the broken one
    zero = before["model.layers.0.mlp.up_proj.weight"] == 0
    assert (weights[zero] == 0).all()
    assert (weights[~zero] != before["model.layers.0.mlp.up_proj.weight"][~zero]).any()


BROKEN = "base_model.model.model.layers.1.mlp.down_proj.lora_A.default.weight"


def test_a_merged_adapter_is_refused(tiny_model):
    adapted = with_adapter(pruned_model("llama", tiny_model("llama")))
    adapted.merge_adapter()
    with pytest.raises(OptionError, match=r"'default' is merged already.*unmerge_adapter\(\)"):
        merge_adapter(adapted)
    adapted.unmerge_adapter()
    before = state(pruned_model("llama", tiny_model("llama")))
    assert not any(lost_zeros(before, state(merge_adapter(adapted))).values())


def test_what_cannot_be_merged_is_refused(tiny_model):
    with pytest.raises(OptionError, match=r"a LlamaForCausalLM: .*PeftModel\.from_pretrained"):
        merge_adapter(make_model("llama"))
    adapted = with_adapter(pruned_model("llama", tiny_model("llama")))
    with pytest.raises(OptionError, match=r"there is no adapter 'nobody'; the model has 'default'"):
        merge_adapter(adapted, adapter_names=["default", "nobody"])
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompted = get_peft_model(pruned_model("llama", tiny_model("llama")), prompt)
    with pytest.raises(OptionError, match=r"kind PROMPT_TUNING cannot be merged"):
        merge_adapter(prompted)


@pytest.mark.parametrize("output_format", ["packed", "dense"])
def test_an_adapter_that_lies_beside_the_model_is_loaded_with_the_pruned_one(
    tiny_model, tmp_path, output_format
):
    source = shutil.copytree(tiny_model("llama"), tmp_path / "source")
    with_adapter(load_model("llama", source)).save_pretrained(source)
    before = state(load_model("llama", source))
    expected = {name: weights for name, weights in before.items() if "lora" in name}
    assert len(expected) > 0
    prune(source, tmp_path / "out", PruneOptions(output_format=output_format))
    found = state(load_model("llama", tmp_path / "out"))
    assert differing({name: found[name] for name in expected}, expected) == []
