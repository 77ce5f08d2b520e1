"""The weights of a packed checkpoint, one after the other, as a server's model takes them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from emp_llm.checkpoint.checkpoint import check_all_listed, open_checkpoint
from emp_llm.checkpoint.dtypes import TORCH_NAMES
from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.shard import Shard, read_shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.checkpoint.weight_files import INDEX_NAME, read_index
from emp_llm.errors import CheckpointError
from emp_llm.loading.read_ahead import Holding, Job, MadeElsewhere, ReadAhead, Reading
from emp_llm.loading.tensor_readers import UnpackingReader
from emp_llm.runtime.pipeline import thread_count
from emp_llm.tensors.packed_reader import open_shard
from emp_llm.tensors.planes import find_packed, holds_planes

__all__ = ["check_folder", "packed_shards", "stored_weights"]


def check_folder(folder: Path) -> None:
    """Check by headers alone that a packed checkpoint's files are there and not cut off.

    Raises:
        CheckpointError: If a file or a listed tensor is missing, or a header is damaged.
        FormatError: If a plane of a packed tensor is missing.
    """
    checkpoint = open_checkpoint(folder)
    check_all_listed(checkpoint.absent)
    for shard in checkpoint.shards:
        find_packed(shard.name, shard.header.tensors)


def packed_shards(files: Iterable[Path]) -> list[Shard]:
    """The shards in some files of safetensors.

    Returns:
        The shards, their headers checked; none if no tensor in them is packed.

    Raises:
        CheckpointError: If a header cannot be read or is damaged, or if there is an index beside
            the files and a tensor that it lists is in none of them.
    """
    shards = [read_shard(file) for file in files]
    held = {entry.name for shard in shards for entry in shard.header.tensors}
    if not holds_planes(held):
        return []
    index = shards[0].path.with_name(INDEX_NAME)
    weight_map = read_index(index)[0] if index.is_file() else {}
    check_all_listed({tensor: name for tensor, name in weight_map.items() if tensor not in held})
    return shards


def stored_weights(
    shards: Sequence[Shard], *, keep_packed: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a packed checkpoint, in the order of its files.

    Some are made ahead, up to a limit of bytes; none stays here once it is given.

    Args:
        shards: Its shards.
        keep_packed: Whether packed tensors are given as `PackedWeight`, and not unpacked.

    Yields:
        The name and the tensor, on the CPU, under the names of the dense checkpoint.

    Raises:
        CheckpointError: If a file cannot be read.
        FormatError: If a packed tensor is damaged.
    """
    with OpenFiles() as files, closing(ReadAhead(thread_count(None))) as ahead:
        jobs = {
            name: job
            for shard in shards
            for name, job in _jobs(shard, files.file(shard), keep_packed=keep_packed)
        }
        for name, job in jobs.items():
            ahead.add(job, name, name)
        for name, job in jobs.items():
            yield name, ahead.take(job)


def _jobs(shard: Shard, file: SourceFile, *, keep_packed: bool) -> Iterator[tuple[str, Job]]:
    """What reads each tensor of a shard, by name."""
    packed, plain = open_shard(shard, file)
    for name, reader in packed.items():
        unpacking = UnpackingReader(reader)
        yield name, Holding(unpacking) if keep_packed else Reading(unpacking)
    for entry in plain:
        yield entry.name, MadeElsewhere(partial(_read, shard, file, entry), entry.nbytes)


def _read(shard: Shard, file: SourceFile, entry: TensorEntry) -> torch.Tensor:
    """A tensor that is not packed."""
    dtype = TORCH_NAMES.get(entry.dtype)
    if dtype is None:
        raise CheckpointError(
            f"{shard.name}: {entry.name!r} is {entry.dtype}, which torch has no dtype for: serve "
            "the checkpoint that it was packed from"
        )
    tensor = torch.empty(entry.shape, dtype=getattr(torch, dtype))
    if tensor.numel():
        file.read_into(entry.start, tensor.view(-1).view(torch.uint8).numpy().data)
    return tensor
