"""Reads tensors of the checkpoint as torch tensors when they are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from emp_llm.checkpoint.dtypes import TORCH_NAMES
from emp_llm.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from emp_llm.checkpoint.checkpoint import Checkpoint
    from emp_llm.checkpoint.open_files import OpenFiles

    Change = Callable[[str, torch.Tensor], torch.Tensor]
    """Given a tensor of the checkpoint by its name, returns what to load in its place."""

__all__ = ["Change", "LazyTensor", "TensorLoader", "compute_dtype", "unchanged"]

_COMPUTABLE = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
_FLOATS = ("BF16", "F16", "F32", "F64")

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, TORCH_NAMES[name]) for name in _COMPUTABLE}
"""The dtypes that a model can be run with, by their names in checkpoints."""


def unchanged(_name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as the checkpoint has it."""
    return tensor


class TensorLoader:
    """Reads tensors of a checkpoint.

    Args:
        checkpoint: The checkpoint.
        files: Its files.

    Attributes:
        change: Applied to every tensor that is read.
    """

    def __init__(self, checkpoint: Checkpoint, files: OpenFiles) -> None:
        self.change: Change = unchanged
        self._checkpoint = checkpoint
        self._files = files

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is to be loaded: what `change` makes of it.

        Raises:
            CheckpointError: If it cannot be read, or no model can be run with its dtype.
        """
        shard, entry = self._checkpoint.tensors[name]
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{name!r} is {entry.dtype}, which no calibration can compute with: load a "
                "dequantized checkpoint"
            )
        tensor = torch.empty(entry.shape, dtype=dtype)
        if tensor.numel():
            data = tensor.view(-1).view(torch.uint8).numpy()
            self._files.file(shard).read_into(entry.start, data.data)
        return self.change(name, tensor)


class LazyTensor:
    """A tensor that is read when transformers takes a slice of it, as of a file of safetensors.

    Args:
        loader: Reads it.
        name: Its name in the checkpoint.
    """

    def __init__(self, loader: TensorLoader, name: str) -> None:
        self._loader = loader
        self._name = name

    def __getitem__(self, _whole: object) -> torch.Tensor:
        return self._loader.read(self._name)


def compute_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What the model computes in: the dtype in its config, or else that of its first floats."""
    text = checkpoint.config.get("text_config")
    named = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    if named is None and isinstance(text, dict):
        named = text.get("dtype", text.get("torch_dtype"))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if str(dtype) == f"torch.{named}":
            return dtype
    stored = (entry.dtype for _, entry in checkpoint.tensors.values())
    return _DTYPES[next((name for name in stored if name in _FLOATS), "F32")]
