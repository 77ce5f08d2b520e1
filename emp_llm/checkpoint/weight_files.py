"""Which files hold a checkpoint's weights: those that transformers would load."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.checkpoint.small_files import CONFIG_NAME, PICKLES
from emp_llm.errors import CheckpointError

__all__ = [
    "INDEX_NAME",
    "TORCH_INDEX_NAME",
    "WEIGHTS_NAME",
    "choose_weights",
    "is_index",
    "read_index",
]

WEIGHTS_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"

_SAFETENSORS = ".safetensors"
_TORCH = ".bin"
_TORCH_NAME = "pytorch_model.bin"
_INDEX = ".index.json"
TORCH_INDEX_NAME = _TORCH_NAME + _INDEX
_LONGEST_NAME = 255  # bytes, of a file on Linux


def choose_weights(config: Mapping[str, Any], names: Iterable[str], where: object) -> str:
    """Choose the file that transformers would load a checkpoint's weights from or by.

    Args:
        config: The content of ``config.json``.
        names: The names of the files beside it.
        where: The folder or repository, for errors.

    Returns:
        The name of a ``.safetensors`` file, of ``pytorch_model.bin``, or of an index of such
        files (``….index.json``).

    Raises:
        CheckpointError: If there is none, or there are several and no index.
    """
    present = set(names)
    chosen = config.get("transformers_weights")
    if chosen is not None:
        _check_name(chosen, f"{CONFIG_NAME}, transformers_weights", (_SAFETENSORS, _INDEX))
        return str(chosen)
    for name in (WEIGHTS_NAME, INDEX_NAME, _TORCH_NAME, TORCH_INDEX_NAME):
        if name in present:
            return name
    others = sorted(name for name in present if name.endswith(_SAFETENSORS))
    if len(others) == 1:
        return others[0]
    if others:
        raise CheckpointError(
            f"{where}: has {len(others)} safetensors files ({others[0]}, …) and no {INDEX_NAME} "
            "to say which ones make up the model: add the index"
        )
    pickles = sorted(name for name in present if name.endswith(PICKLES))
    if pickles:
        raise CheckpointError(
            f"{where}: has neither safetensors nor {_TORCH_NAME}, only other weights "
            f"({pickles[0]}); convert them first: load them with transformers and call "
            "save_pretrained"
        )
    raise CheckpointError(
        f"{where}: has neither {WEIGHTS_NAME} nor {INDEX_NAME}; give a checkpoint with its weights"
    )


def read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Read the index of a sharded checkpoint.

    Returns:
        The name of each tensor with the file name of its shard, and the index's ``metadata``.

    Raises:
        CheckpointError: If it is not an index, or names a file outside its folder.
    """
    index = read_json_object(path, strict=True)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path.name}: has no weight_map of tensors to files; download the index again"
        )
    ending = _TORCH if path.name == TORCH_INDEX_NAME else _SAFETENSORS
    for tensor, name in weight_map.items():
        _check_name(name, f"{path.name}: {tensor!r}", (ending,))
    return weight_map, metadata if isinstance(metadata, dict) else {}


def _check_name(name: object, where: str, endings: tuple[str, ...]) -> None:
    """Refuse what is not a plain file name: a checkpoint must not lead to files elsewhere."""
    if (
        not isinstance(name, str)
        or not name.endswith(endings)
        or any(character in name for character in "/\\\0")
        or len(os.fsencode(name)) > _LONGEST_NAME
    ):
        raise CheckpointError(
            f"{where} names the file {name!r:.120}; it must be a file name that ends in "
            f"{' or '.join(endings)}, without a folder: put the weights beside the index"
        )


def is_index(name: str) -> bool:
    """Whether a file that leads to weights is an index of shards, rather than the weights."""
    return name.endswith(_INDEX)
