"""Weights that are not read are told by their format, with what helps."""

import json
from pathlib import Path

import pytest

from emp_llm.checkpoint.checkpoint import open_checkpoint
from emp_llm.errors import CheckpointError


def refusal(folder: Path, *names: str, config: bool = True) -> str:
    if config:
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name in names:
        (folder / name).touch()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}: ")
    assert "\n" not in message
    return message.removeprefix(f"{folder}: ")


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize(
    ("name", "what", "remedy"),
    [
        (
            "model-Q4_K_M.gguf",
            "GGUF, the format of llama.cpp",
            "give the checkpoint that it was converted from",
        ),
        ("model.onnx", "ONNX", "give the checkpoint that it was exported from"),
        ("tf_model.h5", "TensorFlow's format", "from_tf=True"),
        ("flax_model.msgpack", "Flax's format", "from_flax=True"),
        ("llama.nemo", "a NeMo checkpoint", "NeMo's export"),
        ("weights.npz", "MLX's or NumPy's format", "as safetensors"),
        ("rank0.engine", "a TensorRT engine", "give the checkpoint that it was built from"),
        ("epoch=3.ckpt", "a training checkpoint", "load its state_dict"),
        ("model.pth", "no file that transformers looks for", "save_pretrained"),
        ("__0_0.distcp", "part of a distributed checkpoint of torch", "accelerate merge-weights"),
        ("zero_to_fp32.py", "part of a DeepSpeed checkpoint", "by its zero_to_fp32.py"),
        ("mp_rank_00", "part of a Megatron checkpoint", "with its tools"),
    ],
)
def test_a_format_that_is_not_read_is_named_with_the_remedy(
    tmp_path: Path, name: str, what: str, remedy: str, config: bool
) -> None:
    message = refusal(tmp_path, name, "tokenizer.json", config=config)
    assert message.startswith(f"holds only {name}, which is {what}: ")
    assert remedy in message


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_an_adapter_is_to_be_merged(tmp_path: Path, ending: str, config: bool) -> None:
    message = refusal(tmp_path, f"adapter_model.{ending}", "adapter_config.json", config=config)
    assert message == (
        "holds a PEFT adapter, not a model: merge it into its base model first (merge_and_unload), "
        "and give what that saves"
    )


def test_what_a_training_leaves_is_not_taken_for_weights(tmp_path: Path) -> None:
    message = refusal(tmp_path, "training_args.bin", "optimizer.pt", "rng_state.pth")
    assert message.startswith("has neither model.safetensors nor")


@pytest.mark.parametrize(
    ("names", "variants", "one"),
    [
        (
            ["model.safetensors.index.fp16.json"]
            + [f"model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)],
            "fp16",
            "fp16",
        ),
        (["model.fp16.safetensors", "model.bf16.safetensors"], "bf16 and fp16", "bf16"),
        (["pytorch_model.fp16.bin"], "fp16", "fp16"),
        (["pytorch_model.bin.index.fp16.json"], "fp16", "fp16"),
    ],
)
def test_weights_in_a_variant_are_to_be_saved_without(
    tmp_path: Path, names: list[str], variants: str, one: str
) -> None:
    assert refusal(tmp_path, *names) == (
        f"has its weights only in the variant {variants}: save them without one, by "
        f"from_pretrained('{tmp_path}', variant='{one}') and save_pretrained"
    )


def test_shards_of_torch_without_their_index_are_told_so(tmp_path: Path) -> None:
    names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    message = refusal(tmp_path, *names)
    assert f"has 2 files of weights ({names[0]}, …) and no pytorch_model.bin.index.json" in message
