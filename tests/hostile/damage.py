"""Tools for making hostile checkpoints out of sound ones."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Case(NamedTuple):
    """A hostile checkpoint.

    Attributes:
        spoil: Makes it out of a sound one in this folder; `folder.parent / "outside"` is a folder
            elsewhere, with a secret in it.
        refusal: What the error line must say.
    """

    spoil: Callable[[Path], object]
    refusal: str


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change a file of JSON in place."""
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def put(path: Path, **fields: object) -> None:
    """Set fields of a file of JSON."""
    edit(path, lambda content: content.update(fields))


def rehead(path: Path, text: bytes | Callable[[dict[str, Any]], object], data: bytes = b"") -> None:
    """Give a safetensors file another header, or change the one it has; its data stays."""
    content = path.read_bytes()
    stop = 8 + int.from_bytes(content[:8], "little")
    if callable(text):
        header = json.loads(content[8:stop])
        text(header)
        text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[stop:] + data)


def change_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change the tensors of a safetensors file; bfloat16 is not among them."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def make_sharded(folder: Path) -> None:
    """Put the weights behind an index."""
    name = "model-00001-of-00001.safetensors"
    (folder / WEIGHTS).rename(folder / name)
    content = (folder / name).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header.pop("__metadata__", None)
    index = {"metadata": {}, "weight_map": dict.fromkeys(header, name)}
    (folder / INDEX).write_text(json.dumps(index))


def replace_by_link(path: Path, target: object) -> None:
    """Put a link in the place of a file."""
    path.unlink(missing_ok=True)
    path.symlink_to(str(target))
