"""A checkpoint in Meta's original format, opened as one of Hugging Face's.

    params.json and consolidated.00.pth … → config, and model-00001-of-0000N.safetensors …

Nothing is converted beforehand. The shards do not exist on disk: their bytes are taken from the
parts as they are read.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from emp_llm.checkpoint.dtypes import TORCH_NAMES, item_bytes
from emp_llm.checkpoint.extents import Extent
from emp_llm.checkpoint.header import Header, TensorEntry
from emp_llm.checkpoint.meta_llama.layout import JoinedTensor, Parts
from emp_llm.checkpoint.meta_llama.params import PARAMS_NAME, OriginalParams
from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.errors import CheckpointError

__all__ = ["MAX_SHARD_BYTES", "OriginalLlama", "read_original"]

MAX_SHARD_BYTES: Final = 5_000_000_000
"""Bytes of a shard's tensors, at most, unless one alone is larger."""


@dataclass(frozen=True)
class _OriginalShard(Shard):
    """A shard that does not exist on disk: its bytes come from the parts of Meta's checkpoint.

    Attributes:
        extents: Where its bytes come from; parts are numbered as in `made_from`.
    """

    extents: tuple[Extent, ...] = ()

    def open(self) -> SourceFile:
        """Open the parts, and with them the file that the header describes."""
        from emp_llm.checkpoint.assembled_file import AssembledFile

        with ExitStack() as opened:
            parts = []
            for part in self.made_from:
                parts.append(part.open())
                opened.callback(parts[-1].close)
            opened.pop_all()
        return AssembledFile(self.name, parts, self.extents)


class OriginalLlama(NamedTuple):
    """A checkpoint in Meta's format, described in Hugging Face's layout.

    Attributes:
        shards: Its weights.
        config: The content of its config.json.
        params: What params.json says.
    """

    shards: tuple[Shard, ...]
    config: dict[str, Any]
    params: OriginalParams


def read_original(folder: Path, parts: Sequence[Shard], fields: Mapping[str, Any]) -> OriginalLlama:
    """Describe a checkpoint in Meta's format in Hugging Face's layout.

    Args:
        folder: Its folder.
        parts: Its parts, in order.
        fields: The content of params.json.

    Raises:
        CheckpointError: If it is not a dense Llama, or its parts do not belong together.
    """
    params = OriginalParams.of(fields)
    if params.heads % len(parts) or params.key_heads % len(parts):
        raise CheckpointError(
            f"{PARAMS_NAME}: {params.heads} heads and {params.key_heads} key/value heads cannot be "
            f"divided among {len(parts)} parts: give the model in Hugging Face's layout"
        )
    reading = Parts(parts, params)
    shards = tuple(_shards(folder, parts, list(reading.tensors())))
    config = params.config(
        intermediate=reading.intermediate,
        vocabulary=reading.vocabulary,
        dtype=TORCH_NAMES.get(reading.dtype, reading.dtype),
        tied=reading.tied,
    )
    return OriginalLlama(shards, config, params)


def _shards(
    folder: Path, parts: Sequence[Shard], tensors: Sequence[JoinedTensor]
) -> Iterator[Shard]:
    """Shards of up to `MAX_SHARD_BYTES`, filled with the tensors in their order."""
    groups: list[list[JoinedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        nbytes = _nbytes(tensor)
        if groups[-1] and filled + nbytes > MAX_SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += nbytes
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05}-of-{len(groups):05}" if len(groups) > 1 else "model"
        yield _shard(folder / f"{name}.safetensors", parts, group)


def _shard(path: Path, parts: Sequence[Shard], tensors: Iterable[JoinedTensor]) -> Shard:
    entries: list[TensorEntry] = []
    extents: list[Extent] = []
    end = 0
    for tensor in tensors:
        nbytes, item = _nbytes(tensor), item_bytes(tensor.dtype)
        entries.append(TensorEntry(tensor.name, tensor.dtype, tensor.shape, end, end + nbytes))
        below = [tensor.arrays] if tensor.side_by_side else [(array,) for array in tensor.arrays]
        for arrays in below:
            extents.append(Extent(end, nbytes // len(below), item, arrays))
            end += nbytes // len(below)
    header = Header({"format": "pt"}, tuple(entries), 0, end)
    return _OriginalShard(path.name, path, header, tuple(parts), tuple(extents))


def _nbytes(tensor: JoinedTensor) -> int:
    return math.prod(tensor.shape) * item_bytes(tensor.dtype)
