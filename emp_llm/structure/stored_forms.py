"""Weights that are not stored as such, though the config does not say so: quantized, or sharded.

They are known by the tensors beside them, or by their shape. Each error says how to get them dense.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Final

from emp_llm.errors import CheckpointError
from emp_llm.structure.landing import Landing

__all__ = ["check_gathered", "check_not_quantized", "quantized_by"]

_QUANTIZERS: Final = (
    (r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format)$", "bitsandbytes"),
    (r"\.quant_state\.\w+$", "bitsandbytes"),
    (r"\.biases$", "MLX"),  # beside scales, which GPTQ has too
    (r"\.(qweight|qzeros|scales|g_idx)$", "GPTQ or AWQ"),
    (r"\.weight_scale_inv$", "FP8"),
    (r"\.weight_(packed|shape|zero_point|global_scale)$", "compressed-tensors"),
    (r"\.(weight_scale|input_scale)$", "FP8 or compressed-tensors"),
    (r"_(blocks|scales)$", "MXFP4"),
    (r"\.weight\._(data|scale|shift)$", "Quanto"),
    (r"\.W_q$", "HQQ"),
)
"""The end of a name that only a quantized checkpoint has, and by what it was quantized; the first
that is found counts."""


def quantized_by(names: Iterable[str]) -> tuple[str, str] | None:
    """What a checkpoint was quantized by, and a tensor that shows it.

    Args:
        names: Names of tensors that are not parameters of the model.

    >>> quantized_by(["model.layers.0.mlp.up_proj.weight.absmax"])
    ('bitsandbytes', 'model.layers.0.mlp.up_proj.weight.absmax')
    """
    present = list(names)
    for ending, method in _QUANTIZERS:
        for name in present:
            if re.search(ending, name):
                return method, name
    return None


def check_not_quantized(where: str, landings: Mapping[str, Landing | None]) -> None:
    """Refuse a checkpoint with tensors that only a quantized one has.

    Args:
        where: The checkpoint, for errors.
        landings: The parameter that each tensor is loaded into, by the tensor's name.

    Raises:
        CheckpointError: If it has such tensors.
    """
    found = quantized_by(name for name, landing in landings.items() if landing is None)
    if found is not None:
        raise CheckpointError(
            f"{where}: the weights are quantized by {found[0]}, as {found[1]!r} shows, though "
            "config.json has no quantization_config: give the dense checkpoint that they were made "
            "from, or dequantize them"
        )


def check_gathered(
    where: str,
    shapes: Mapping[str, tuple[int, ...]],
    landings: Mapping[str, Landing | None],
) -> None:
    """Refuse the empty tensors that a process of DeepSpeed's ZeRO-3 saves for what others hold.

    Args:
        where: The checkpoint, for errors.
        shapes: Shape of each tensor of the checkpoint, by name.
        landings: The parameter that each tensor is loaded into, by the tensor's name.

    Raises:
        CheckpointError: If there are such tensors.
    """
    empty = [
        name
        for name, landing in landings.items()
        if shapes[name] == (0,) and landing is not None and landing.place.shape not in (None, (0,))
    ]
    if empty:
        raise CheckpointError(
            f"{where}: {len(empty)} of {len(shapes)} tensors are empty, such as {empty[0]!r}, as "
            "DeepSpeed ZeRO-3 leaves them in each process: gather them when saving "
            "(stage3_gather_16bit_weights_on_model_save), or run zero_to_fp32.py on the checkpoint"
        )
