"""Which files hold a checkpoint's weights: those that transformers would load."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.checkpoint.left_behind import CONFIG_NAME
from emp_llm.checkpoint.other_formats import describe_other_format
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
_ADAPTERS = re.compile(r"adapter_model.*\.safetensors")
# what save_pretrained(variant="fp16") writes: one file, shards, or their index
_VARIANT = re.compile(
    r"(?:model|pytorch_model)"
    r"(?:\.(?P<file>[\w-]+?)(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)"
    r"|\.(?:safetensors|bin)\.index\.(?P<index>[\w-]+)\.json)"
)


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
        CheckpointError: If there is none, or there are several and no index, or only weights in
            another format or in a variant of which there are several files.
    """
    present = set(names)
    chosen = config.get("transformers_weights")
    if chosen is not None:
        _check_name(chosen, f"{CONFIG_NAME}, transformers_weights", (_SAFETENSORS, _INDEX))
        return str(chosen)
    for name in (WEIGHTS_NAME, INDEX_NAME, _TORCH_NAME, TORCH_INDEX_NAME):
        if name in present:
            return name
    others = sorted(
        name for name in present if name.endswith(_SAFETENSORS) and not _ADAPTERS.fullmatch(name)
    )
    if len(others) == 1:
        return others[0]
    if variants := set(_variants(present)):
        variant = min(variants)
        raise CheckpointError(
            f"{where}: has its weights only in the variant {' and '.join(sorted(variants))}: save "
            f"them without one, by from_pretrained({str(where)!r}, variant={variant!r}) and "
            "save_pretrained"
        )
    for files, index in ((others, INDEX_NAME), (_torch_shards(present), TORCH_INDEX_NAME)):
        if files:
            raise CheckpointError(
                f"{where}: has {len(files)} files of weights ({files[0]}, …) and no {index} "
                "to say which ones make up the model: add the index"
            )
    if instead := describe_other_format(present):
        raise CheckpointError(f"{where}: holds {instead}")
    raise CheckpointError(
        f"{where}: has neither {WEIGHTS_NAME} nor {INDEX_NAME}; give a checkpoint with its weights"
    )


def _torch_shards(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if re.fullmatch(r"pytorch_model-\d+-of-\d+\.bin", name))


def _variants(names: Iterable[str]) -> Iterator[str]:
    """The variants, such as fp16, that files of weights or indexes are of."""
    for name in names:
        if match := _VARIANT.fullmatch(name):
            yield match["file"] or match["index"]


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
