"""Weights in formats that are not read: what they are, by the names of files, and what helps."""

import re
from collections.abc import Iterable
from typing import Final

__all__ = ["describe_other_format"]

_ADAPTER: Final = (
    r"adapter_config\.json|adapter_model\.(safetensors|bin)",
    "a PEFT adapter, not a model: merge it into its base model first (merge_and_unload), and give "
    "what that saves",
)
_SAVE: Final = "and call save_pretrained"
_FORMATS: Final = (
    (
        r".*\.(gguf|ggml)",
        "GGUF, the format of llama.cpp: give the checkpoint that it was converted from",
    ),
    (
        r".*\.distcp|pytorch_model_fsdp_\d+",
        "part of a distributed checkpoint of torch: join it first (accelerate merge-weights, or "
        "dcp_to_torch_save of torch.distributed.checkpoint.format_utils)",
    ),
    (
        r"zero_to_fp32\.py|global_step\d+|bf16_zero_.*\.pt|zero_pp_rank_.*\.pt",
        "part of a DeepSpeed checkpoint: join it first, by its zero_to_fp32.py",
    ),
    (
        r".*\.nemo|model_weights",
        "a NeMo checkpoint: convert it to Hugging Face's layout with NeMo's export first",
    ),
    (
        r"iter_\d+|mp_rank_\d+.*|latest_checkpointed_iteration\.txt",
        "part of a Megatron checkpoint: convert it to Hugging Face's layout with its tools first",
    ),
    (r".*\.(engine|plan)", "a TensorRT engine: give the checkpoint that it was built from"),
    (
        r".*\.(onnx|onnx_data|onnx\.data)",
        "ONNX: give the checkpoint that it was exported from",
    ),
    (
        r".*\.(h5|pb|tflite)",
        f"TensorFlow's format: load it with a transformers before 5 (from_tf=True), {_SAVE}",
    ),
    (
        r".*\.msgpack",
        f"Flax's format: load it with a transformers before 5 (from_flax=True), {_SAVE}",
    ),
    (
        r".*\.npz",
        "MLX's or NumPy's format: save the weights as safetensors under Hugging Face's names first",
    ),
    (
        r".*\.(mlmodel|mlpackage)",
        "Core ML: give the checkpoint that it was converted from",
    ),
    (
        r".*\.ckpt",
        f"a training checkpoint: load its state_dict into transformers' class of the model {_SAVE}",
    ),
    (
        r"(?!(training_args|optimizer|scheduler|rng_state|scaler)\b).*\.(bin|pth|pt|pkl|ot)",
        f"no file that transformers looks for: load it into its class of the model {_SAVE}",
    ),
)
"""Names of files or folders of a format, and what follows "holds only"; the first that fits."""


def describe_other_format(names: Iterable[str]) -> str | None:
    """What a folder without weights that can be read holds instead, with the remedy.

    Args:
        names: Names of the files and folders in it.

    Returns:
        What follows "holds"; None if there are no weights of any known format.

    >>> describe_other_format(["tokenizer.json", "model.gguf"])
    'only model.gguf, which is GGUF, the format of llama.cpp: give the checkpoint that it was \
converted from'
    """
    present = sorted(names)
    pattern, described = _ADAPTER
    if any(re.fullmatch(pattern, name) for name in present):
        return described
    for pattern, described in _FORMATS:
        if found := next((name for name in present if re.fullmatch(pattern, name)), None):
            return f"only {found}, which is {described}"
    return None
