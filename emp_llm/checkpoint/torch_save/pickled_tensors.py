"""The storages and tensors that the calls in the pickle of a torch checkpoint would make.

torch pickles a tensor as a call of one of its own functions on plain values. Here the result of
such a call is described; the function is neither imported nor run.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from emp_llm.checkpoint.dtypes import item_bytes
from emp_llm.checkpoint.header import MAX_DIMENSIONS, UnreadableError
from emp_llm.checkpoint.torch_save.names import (
    DTYPES,
    ORDERED_DICT,
    REBUILD,
    REBUILD_TYPE,
    STORAGES,
    TENSORS,
    UNTYPED,
)

__all__ = [
    "NamedObject",
    "OtherObject",
    "Storage",
    "StoredTensor",
    "call",
    "damaged",
    "fill_dict",
    "find_storage",
]

_MAX_ITEMS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of bytes that one or more tensors lie in.

    Attributes:
        key: Its name in the file.
        dtype: A key of `emp_llm.checkpoint.dtypes.ITEM_BITS`; None if each of its tensors has its
            own.
        nbytes: Its length in bytes.
    """

    key: str
    dtype: str | None
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a torch checkpoint.

    Attributes:
        storage: The storage that it lies in.
        dtype: A key of `emp_llm.checkpoint.dtypes.ITEM_BITS`.
        start: Offset of its first item in the storage, in bytes.
        shape: Sizes, outermost first.
        strides: In bytes, none negative. Along a dimension of size 1, where any stride would do, it
            is that of a dense tensor.
    """

    storage: Storage
    dtype: str
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its items."""
        return math.prod(self.shape) * item_bytes(self.dtype)


@dataclass(frozen=True, slots=True)
class NamedObject:
    """A class or function that a pickle names, with its module: ``torch.FloatStorage``."""

    name: str


@dataclass(frozen=True, slots=True)
class OtherObject:
    """Something that torch could make, and that safetensors cannot hold."""

    name: str


def damaged() -> UnreadableError:
    """The error for a pickle that torch cannot have written."""
    return UnreadableError("has a damaged pickle; download it again")


def fill_dict(fields: dict[object, object], items: Iterable[object]) -> None:
    """Put items, pairs of a key and a value, into a dict.

    Raises:
        UnreadableError: If an item is not a pair, or its key is not one that a state dict has.
    """
    for item in items:
        if not isinstance(item, tuple | list) or len(item) != 2 or not _is_key(item[0]):
            raise damaged()
        fields[item[0]] = item[1]


def _is_key(value: object) -> bool:
    """Whether a value is hashed quickly, and not to what a thousand other keys are hashed to.

    An int is its own hash only below the modulus, so larger ones can be made to collide; the
    hashes of texts are randomised.
    """
    return type(value) is str or (type(value) is int and abs(value) < sys.hash_info.modulus)


def call(name: str, arguments: tuple[object, ...]) -> object:
    """Describe what a function of torch would return.

    Args:
        name: The function's name, one of `emp_llm.checkpoint.torch_save.names.ALLOWED`.
        arguments: What it is called with.

    Returns:
        A `StoredTensor`, a dict, the value of a ``torch.Size``, or an `OtherObject`.

    Raises:
        UnreadableError: If the call is impossible, or makes a tensor that its bytes alone do not
            describe.
    """
    if name == ORDERED_DICT:
        fields: dict[object, object] = {}
        if arguments:
            fill_dict(fields, arguments[0] if isinstance(arguments[0], list) else [None])
        return fields
    if name == "torch.Size" and len(arguments) == 1:
        return arguments[0]
    if name in (f"{REBUILD}tensor", f"{REBUILD}tensor_v2") and len(arguments) >= 4:
        _check_plain(arguments[6:7])
        return _tensor(*arguments[:4], dtype=None)
    if name == f"{REBUILD}tensor_v3" and len(arguments) >= 7:
        _check_plain(arguments[7:8])
        return _tensor(*arguments[:4], dtype=arguments[6])
    if name == REBUILD_TYPE and len(arguments) == 4:
        return _rebuild_from_type(*arguments[:3])
    wraps = (f"{REBUILD}parameter", f"{REBUILD}parameter_with_state", *TENSORS)
    if name in wraps and arguments and isinstance(arguments[0], StoredTensor):
        return arguments[0]
    return OtherObject(name)


def _rebuild_from_type(rebuild: object, kind: object, inner: object) -> object:
    """The call that `REBUILD_TYPE` passes on: of `rebuild` on `inner`, for a tensor class."""
    if not isinstance(kind, NamedObject):
        return OtherObject("a tensor of another class")
    if kind.name not in TENSORS:
        return OtherObject(kind.name)
    if not isinstance(rebuild, NamedObject) or not isinstance(inner, tuple):
        raise damaged()
    if rebuild.name == REBUILD_TYPE:  # calling itself, which could go on forever
        raise damaged()
    return call(rebuild.name, inner)


def find_storage(identity: object) -> Storage:
    """The storage that a pickle means by ("storage", class, key, device, items, ...).

    Raises:
        UnreadableError: If it is not such a tuple, or safetensors lack the dtype of the class.
    """
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise damaged()
    _, kind, key, _, count, *view = identity
    if not isinstance(kind, NamedObject) or not isinstance(key, str) or not _is_size(count):
        raise damaged()
    if view and view[0] is not None:
        raise UnreadableError(
            "was saved by a torch before 0.4: load it with torch and save it again"
        )
    dtype = None if kind.name in UNTYPED else STORAGES.get(kind.name.rpartition(".")[2])
    if dtype is None and kind.name not in UNTYPED:
        raise UnreadableError(f"has a {kind.name}, which safetensors lack: convert it first")
    return Storage(key, dtype, count * (item_bytes(dtype) if dtype else 1))


def _check_plain(metadata: Sequence[object]) -> None:
    """Refuse a tensor that is not what its bytes say, but their negative or conjugate."""
    if any(metadata):
        raise UnreadableError(
            "has a tensor of torch's lazy negatives or conjugates: save it after "
            ".resolve_neg().resolve_conj()"
        )


def _tensor(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    *,
    dtype: object,
) -> StoredTensor:
    if not isinstance(storage, Storage) or not _is_size(offset):
        raise damaged()
    if not _are_sizes(shape) or not _are_sizes(strides) or len(shape) != len(strides):
        raise damaged()
    name = _dtype(storage, dtype)
    item = item_bytes(name)
    sizes, places = tuple(shape), _strides(shape, strides, item)
    reach = sum((size - 1) * stride for size, stride in zip(sizes, places, strict=True)) + item
    start = offset * item
    if 0 not in sizes and start + reach > storage.nbytes:
        raise UnreadableError(
            f"has a tensor that ends at byte {start + reach:,} of a storage of "
            f"{storage.nbytes:,} bytes; download it again"
        )
    return StoredTensor(storage, name, start, sizes, places)


def _dtype(storage: Storage, dtype: object) -> str:
    if storage.dtype is not None and dtype is None:
        return storage.dtype
    if not isinstance(dtype, NamedObject):
        raise damaged()
    name = DTYPES.get(dtype.name.removeprefix("torch."))
    if name is None:
        raise UnreadableError(f"has a {dtype.name} tensor, which safetensors lack: convert it")
    return name


def _strides(shape: Sequence[int], strides: Sequence[int], item: int) -> tuple[int, ...]:
    """Strides in bytes; those along dimensions of size 1 are made those of a dense tensor."""
    items = 1
    for size in shape:
        items *= size
        if items > _MAX_ITEMS:
            raise damaged()
    places = []
    dense = item
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        places.append(stride * item if size > 1 and items else dense)
        dense *= max(size, 1)
    return tuple(reversed(places))


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= _MAX_ITEMS


def _are_sizes(values: object) -> TypeGuard[Sequence[int]]:
    return (
        isinstance(values, tuple | list)
        and len(values) <= MAX_DIMENSIONS
        and all(map(_is_size, values))
    )
