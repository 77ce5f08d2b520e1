"""What a file of torch.save holds, zip or legacy: tensors, and the storages they lie in."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from emp_llm.checkpoint.header import DOWNLOAD_AGAIN, UnreadableError
from emp_llm.checkpoint.torch_save.pickled_tensors import Storage, StoredTensor

__all__ = ["Contents", "big_endian", "storages_of"]


class Contents(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: Its tensors by name, in the order of the state dict.
        storage_start: Finds the offset of a storage's first byte in the file.
    """

    tensors: dict[str, StoredTensor]
    storage_start: Callable[[Storage], int]


def storages_of(tensors: Mapping[str, StoredTensor]) -> dict[str, Storage]:
    """The storages that tensors lie in, by key.

    Raises:
        UnreadableError: If two of different kinds or lengths have one key.
    """
    storages: dict[str, Storage] = {}
    for tensor in tensors.values():
        if storages.setdefault(tensor.storage.key, tensor.storage) != tensor.storage:
            raise UnreadableError(f"has storage {tensor.storage.key:.40} twice; {DOWNLOAD_AGAIN}")
    return storages


def big_endian() -> UnreadableError:
    """The error for a file whose numbers have their bytes the other way round."""
    return UnreadableError(
        "was saved on a big-endian machine: load it there, save it as safetensors"
    )
