import json

import pytest
import transformers
from support.architectures import pruned, read_tensors, with_config
from support.expected_targets import LLAMA

from emp_llm.errors import CheckpointError
from emp_llm.structure.targets import decide, decide_targets


@pytest.fixture
def llama(tiny_model):
    return tiny_model("llama")


def _refusal(folder, tensors, **options):
    with pytest.raises(CheckpointError) as caught:
        decide_targets(folder, tensors, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_quantized_checkpoint_is_refused(llama, tmp_path):
    folder = with_config(tmp_path, llama, quantization_config={"quant_method": "gptq", "bits": 4})
    message = _refusal(folder, read_tensors(llama))
    assert message.startswith(str(folder / "config.json"))
    assert "quant_method 'gptq'" in message
    assert "dequantized" in message


def test_a_quantized_checkpoint_that_names_no_method_is_refused(llama, tmp_path):
    folder = with_config(tmp_path, llama, quantization_config={"group_size": 64, "bits": 4})
    message = _refusal(folder, read_tensors(llama))
    assert "is quantized (no quant_method is given, as by MLX)" in message


def test_a_quantized_part_of_a_model_is_refused(tiny_model, tmp_path):
    config = json.loads((tiny_model("llava") / "config.json").read_text())
    text_config = {**config["text_config"], "quantization_config": {"quant_method": "awq"}}
    folder = with_config(tmp_path, tiny_model("llava"), text_config=text_config)
    assert "'awq'" in _refusal(folder, read_tensors(tiny_model("llava")))


def test_a_packed_checkpoint_is_refused_with_the_way_out(llama, tmp_path):
    folder = with_config(tmp_path, llama, quantization_config={"quant_method": "emp"})
    message = _refusal(folder, read_tensors(llama))
    assert "already packed" in message
    assert "emp-llm unpack" in message


def test_a_target_of_another_dtype_is_refused_with_the_way_out(llama):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = {**read_tensors(llama), name: ("F8_E4M3", (24, 16))}
    assert _refusal(llama, tensors) == (
        f"'{name}' is F8_E4M3; emp-llm prunes float16, bfloat16 and float32. "
        "Load a dequantized checkpoint or add --ignore 'up_proj'."
    )
    assert name not in pruned(decide_targets(llama, tensors, ignore=["up_proj"]))


def test_the_way_out_works_for_experts_too(tiny_model):
    folder = tiny_model("mixtral")
    tensors = read_tensors(folder)
    tensors = {
        name: ("F8_E4M3" if ".w1." in name else "BF16", shape)
        for name, (_, shape) in tensors.items()
    }
    assert "--ignore 'w1'" in _refusal(folder, tensors)
    assert decide_targets(folder, tensors, ignore=["w1"])


def test_another_dtype_elsewhere_is_no_matter(llama):
    tensors = {**read_tensors(llama), "model.embed_tokens.weight": ("F8_E4M3", (32, 16))}
    assert pruned(decide_targets(llama, tensors)) == set(LLAMA.mlp)


def test_a_model_type_unknown_to_transformers_is_refused(llama, tmp_path):
    folder = with_config(tmp_path, llama, model_type="llama99")
    message = _refusal(folder, read_tensors(llama))
    assert f"transformers {transformers.__version__} does not know model_type 'llama99'" in message


def test_a_model_type_that_comes_with_code_is_refused(llama, tmp_path):
    folder = with_config(
        tmp_path, llama, model_type="llama99", auto_map={"AutoConfig": "configuration.Config"}
    )
    (folder / "configuration.py").write_text("raise SystemExit('this code must not run')")
    assert "runs no code from a checkpoint" in _refusal(folder, read_tensors(llama))


def test_an_architecture_that_comes_with_code_is_refused(llama, tmp_path):
    folder = with_config(
        tmp_path,
        llama,
        architectures=["MyLlama"],
        auto_map={"AutoModelForCausalLM": "modeling.MyLlama"},
    )
    message = _refusal(folder, read_tensors(llama))
    assert "'MyLlama'" in message
    assert "runs no code from a checkpoint" in message


def test_code_beside_a_known_architecture_is_not_run(llama, tmp_path):
    folder = with_config(tmp_path, llama, auto_map={"AutoConfig": "configuration.Config"})
    (folder / "configuration.py").write_text("raise SystemExit('this code must not run')")
    assert pruned(decide_targets(folder, read_tensors(llama))) == set(LLAMA.mlp)


def test_a_kernel_that_the_config_names_is_not_fetched(llama, tmp_path):
    folder = with_config(
        tmp_path,
        llama,
        attn_implementation="someone/kernel",
        experts_implementation="someone/kernel",
    )
    assert pruned(decide_targets(folder, read_tensors(llama))) == set(LLAMA.mlp)


def test_a_missing_config_is_refused(tmp_path):
    assert "config.json: cannot be read" in _refusal(tmp_path, {})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "not an object"),
        ("{}", "model_type"),
        ('{"model_type": 3}', "model_type"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "refuses this config"),
        (
            '{"model_type": "opt", "architectures": ["OPTForCausalLM"], "num_attention_heads": 5}',
            "cannot be built",
        ),
    ],
)
def test_a_config_that_is_none_is_refused(text, says, tmp_path):
    (tmp_path / "config.json").write_text(text)
    assert says in _refusal(tmp_path, {})


def test_a_package_that_is_missing_is_named(llama, monkeypatch):
    def fail(*_):
        raise ImportError("LlamaForCausalLM requires the timm library")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", fail)
    message = _refusal(llama, read_tensors(llama))
    assert "a package that is not installed: LlamaForCausalLM requires the timm" in message


def test_a_tensor_that_does_not_fit_the_config_is_refused(llama):
    name = "model.layers.1.mlp.up_proj.weight"
    message = _refusal(llama, {**read_tensors(llama), name: ("BF16", (25, 16))})
    assert f"'{name}' has the shape [25, 16]" in message
    assert "[24, 16]" in message


def test_nothing_to_prune_is_refused_with_examples(llama):
    message = _refusal(llama, read_tensors(llama), targets="block_sparse", ignore=["w1", "w2"])
    assert "targets 'block_sparse'" in message
    assert "ignore 'w1'" in message
    assert "ignore 'w2'" in message
    assert "layers.1.mlp.down_proj.weight'" in message


def test_a_checkpoint_without_linear_layers_says_so():
    with pytest.raises(CheckpointError, match=r"^here: nothing .*no linear layer that can be prun"):
        decide("here", {}, {}, targets="mlp", ignore=())
