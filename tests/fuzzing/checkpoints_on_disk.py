"""Folders that are checkpoints, or nearly: config, index and shards that contradict each other."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fuzzing.choices import Choices
from fuzzing.headers import check_message, make_header
from fuzzing.json_inputs import NAMES, spoiled, text_of
from safetensors.numpy import save

from emp_llm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from emp_llm.errors import EmpError

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
OUTSIDE = "../outside.safetensors"
INDEX = "model.safetensors.index.json"
FILES = [
    *("model.safetensors", "config.json", INDEX, *SHARDS, "tokenizer.json", "README.md"),
    *("adapter_config.json", "pytorch_model.bin", "a\nb.json", "emp_report.json", "x.safetensors"),
]


def put_outside(folder: Path) -> None:
    """Put files beside a checkpoint's folder that it must not lead to."""
    (folder.parent / "outside.json").write_text('{"secret": 1}')
    (folder / OUTSIDE).write_bytes(save({"secret": np.zeros(1, np.uint8)}))


def make_folder(choices: Choices, folder: Path) -> None:
    """Fill an empty folder."""
    config: Any = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if choices.once_in(6):
        config["transformers_weights"] = choices.pick([*FILES, *NAMES])
    shards = {name: _tensors(choices) for name in SHARDS[: choices.number(1, 2)]}
    index: Any = {
        "metadata": {"total_size": 0},
        "weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors},
    }
    if choices.once_in(3):
        index = spoiled(choices, index)
    elif choices.once_in(3):
        tensor = choices.pick(sorted(index["weight_map"]))
        index["weight_map"] |= choices.pick([{tensor: choices.pick(SHARDS)}, {"secret": OUTSIDE}])
    if choices.once_in(6):
        config = spoiled(choices, config)
    (folder / "config.json").write_bytes(text_of(choices, config))
    (folder / INDEX).write_bytes(text_of(choices, index) if choices.once_in(3) else _json(index))
    for name, tensors in shards.items():
        content = make_header(choices) if choices.once_in(8) else save(tensors)
        (folder / name).write_bytes(content)
    if choices.once_in(3):
        _put_in_the_way(choices, folder / choices.pick(FILES))


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _tensors(choices: Choices) -> dict[str, np.ndarray]:
    names = [name for name in NAMES if name != "__metadata__"]
    chosen = [
        choices.pick(names) if choices.once_in(8) else f"t{choices.number(0, 20)}"
        for _ in range(choices.number(1, 3))
    ]
    return {name: np.zeros(choices.number(0, 3), np.uint8) for name in chosen}


def _put_in_the_way(choices: Choices, path: Path) -> None:
    path.unlink(missing_ok=True)
    outside = path.parent.parent / "outside.json"
    kinds: list[Callable[[], object]] = [
        lambda: None,
        path.touch,
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(choices.pick(["/dev/zero", outside, "nowhere", path.name, "."])),
        lambda: path.symlink_to(choices.pick(FILES)),
        lambda: path.write_bytes(choices.data(choices.number(1, 40))),
        lambda: path.write_bytes(_json(spoiled(choices, {"weight_map": {}}))),
    ]
    choices.pick(kinds)()


def check_folder(folder: Path) -> bool:
    """Open a checkpoint; returns whether it was taken.

    Raises:
        AssertionError: If what was opened is not sound.
    """
    try:
        checkpoint = open_checkpoint(folder)
    except EmpError as error:
        check_message(error, folder.name, *FILES, "tensor ")
        return False
    _check_sound(checkpoint, folder)
    return True


def _check_sound(checkpoint: Checkpoint, folder: Path) -> None:
    names = [shard.name for shard in checkpoint.shards]
    assert names == sorted(set(names))
    seen: set[str] = set()
    for shard in checkpoint.shards:
        assert shard.path.parent == folder
        assert shard.path.name == shard.name
        assert shard.path.stat().st_size == shard.header.file_size
        tensors = {entry.name for entry in shard.header.tensors}
        assert not tensors & seen
        seen |= tensors
    assert checkpoint.tensors.keys() == seen
    for path in (
        checkpoint.config and "config.json",
        checkpoint.index_name,
        *checkpoint.other_files,
    ):
        if path:
            assert (folder / path).resolve().is_relative_to(folder.resolve())
            assert (folder / path).is_file()
    if checkpoint.index_name:
        weight_map = json.loads((folder / checkpoint.index_name).read_bytes())["weight_map"]
        absent = {name: file for name, file in weight_map.items() if name not in seen}
        assert checkpoint.absent == absent


def fresh(folder: Path) -> Path:
    """An empty folder of that name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder
