"""Weights in another form than the config says are told by that form, and how to get them dense."""

from pathlib import Path

import pytest
from support.architectures import read_tensors

from emp_llm.errors import CheckpointError
from emp_llm.structure.targets import decide_targets

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def refusal(folder: Path, tensors: Tensors, **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        decide_targets(folder, tensors, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def with_linear(tensors: Tensors, *stored: tuple[str, str]) -> Tensors:
    """The tensors with those of each linear layer replaced: by ends of names and dtypes."""
    result: Tensors = {}
    for name, kind in tensors.items():
        if "_proj.weight" in name:
            layer = name.removesuffix(".weight")
            result |= {f"{layer}.{end}": (dtype, (48, 1)) for end, dtype in stored}
        else:
            result[name] = kind
    return result


@pytest.mark.parametrize(
    ("stored", "method"),
    [
        ([("weight", "U8"), ("weight.absmax", "F32"), ("weight.quant_map", "F32")], "bitsandbytes"),
        ([("weight", "U8"), ("weight.quant_state.bitsandbytes__nf4", "U8")], "bitsandbytes"),
        ([("qweight", "I32"), ("qzeros", "I32"), ("scales", "F16")], "GPTQ or AWQ"),
        ([("weight", "U32"), ("scales", "BF16"), ("biases", "BF16")], "MLX"),
        ([("weight_packed", "I32"), ("weight_shape", "I64")], "compressed-tensors"),
        ([("W_q", "U8"), ("meta", "U8")], "HQQ"),
        ([("weight._data", "I8"), ("weight._scale", "BF16")], "Quanto"),
    ],
)
@pytest.mark.parametrize("targets", ["mlp", "attention"])
def test_quantized_weights_without_their_config_are_named(
    stored: list[tuple[str, str]], method: str, targets: str, tiny_model
) -> None:
    folder = tiny_model("llama")
    message = refusal(folder, with_linear(read_tensors(folder), *stored), targets=targets)
    assert message.startswith(f"{folder}: the weights are quantized by {method}, as 'model.layers.")
    assert "config.json has no quantization_config: give the dense checkpoint" in message


@pytest.mark.parametrize(
    ("dtype", "beside", "method"),
    [
        ("I8", "SCB", "bitsandbytes"),
        ("F8_E4M3", "weight_scale_inv", "FP8"),
        ("F8_E4M3", "weight_scale", "FP8 or compressed-tensors"),
    ],
)
def test_quantized_weights_of_the_right_shape_are_named(
    dtype: str, beside: str, method: str, tiny_model
) -> None:
    folder = tiny_model("llama")
    tensors = read_tensors(folder)
    up = "model.layers.0.mlp.up_proj."
    tensors |= {f"{up}weight": (dtype, (24, 16)), f"{up}{beside}": ("F32", (1,))}
    assert f"quantized by {method}, as '{up}{beside}'" in refusal(folder, tensors)
    assert decide_targets(folder, tensors, ignore=["up_proj"])


def test_the_experts_of_mxfp4_are_named(tiny_model) -> None:
    folder = tiny_model("gpt-oss")
    tensors = {}
    for name, kind in read_tensors(folder).items():
        if name.endswith(("experts.down_proj", "experts.gate_up_proj")):
            tensors |= {
                f"{name}_blocks": ("U8", (4, 8, 1, 16)),
                f"{name}_scales": ("U8", (4, 8, 1)),
            }
        else:
            tensors[name] = kind
    assert "quantized by MXFP4" in refusal(folder, tensors, targets="attention")


def test_tensors_that_zero_3_left_empty_are_to_be_gathered(tiny_model) -> None:
    folder = tiny_model("llama")
    tensors = {name: (dtype, (0,)) for name, (dtype, _) in read_tensors(folder).items()}
    assert refusal(folder, tensors) == (
        f"{folder}: 21 of 21 tensors are empty, such as 'lm_head.weight', as DeepSpeed ZeRO-3 "
        "leaves them in each process: gather them when saving "
        "(stage3_gather_16bit_weights_on_model_save), or run zero_to_fp32.py on the checkpoint"
    )


def test_float64_is_to_be_cast(tiny_model) -> None:
    folder = tiny_model("llama")
    tensors = {name: ("F64", shape) for name, (_, shape) in read_tensors(folder).items()}
    message = refusal(folder, tensors)
    assert message == (
        "'model.layers.0.mlp.down_proj.weight' is F64; emp-llm prunes float16, bfloat16 and "
        "float32. Cast the checkpoint: from_pretrained(..., dtype='float32') and save_pretrained."
    )


@pytest.mark.parametrize("dtype", ["BOOL", "C64"])
def test_what_no_quantization_makes_is_not_called_quantized(dtype: str, tiny_model) -> None:
    folder = tiny_model("llama")
    tensors = read_tensors(folder) | {"model.layers.0.mlp.up_proj.weight": (dtype, (24, 16))}
    message = refusal(folder, tensors)
    assert f"is {dtype}; emp-llm prunes float16, bfloat16 and float32. To leave such" in message
