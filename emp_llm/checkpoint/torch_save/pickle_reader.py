"""The pickle of a torch checkpoint, read without running it: which tensors there are, and where.

The standard library takes the pickle apart into its operations; here those that
``torch.load(weights_only=True)`` allows are followed, on plain values. Nothing that a pickle names
is imported or called. Whatever else it names is refused.
"""

import math
import pickletools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, TypeGuard

from emp_llm.checkpoint.safetensors_header import ITEM_BITS
from emp_llm.checkpoint.torch_save.names import (
    ALLOWED,
    DTYPES,
    ORDERED_DICT,
    REBUILD,
    REBUILD_TYPE,
    STORAGES,
    TENSORS,
    UNTYPED,
)
from emp_llm.messages import shortened

__all__ = [
    "MAX_PICKLE_BYTES",
    "PickleError",
    "Storage",
    "StoredTensor",
    "read_pickle",
    "tensors_of",
]

MAX_PICKLE_BYTES: Final = 16 << 20
"""The longest pickle that is read; one of 10,000 tensors is 3 MB long."""

_MAX_OPERATIONS = 4_000_000
_COPYING = 8  # what to copy an item counts as: it takes so much more memory
_MAX_DIMENSIONS = 64
_MAX_NAME = 1024
_RESERVED_NAME = "__metadata__"
_MAX_ITEMS = 2**63 - 1

_PYTHON_2 = {"__builtin__": "builtins"}


class PickleError(Exception):
    """What is wrong with a pickle, before it is known which file's."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of bytes that tensors lie in.

    Attributes:
        key: Its name in the file.
        dtype: A key of `ITEM_BITS`; None where its tensors say.
        nbytes: Its length.
    """

    key: str
    dtype: str | None
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a torch checkpoint.

    Attributes:
        storage: What it lies in.
        dtype: A key of `ITEM_BITS`.
        start: Offset of its first item in the storage, in bytes.
        shape: Sizes, outermost first.
        strides: In bytes, none negative; dense where the size is 1.
    """

    storage: Storage
    dtype: str
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its items."""
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class _Other:
    """Something that torch could make and that is no tensor of safetensors."""

    name: str


class _Mark:
    pass


def read_pickle(file: BinaryIO) -> Any:  # noqa: ANN401 (whatever it holds)
    """Read one pickle of a torch checkpoint and leave the file behind its end.

    Returns:
        What it holds: plain values, with `StoredTensor` for tensors.

    Raises:
        PickleError: If it is damaged, or names what is no part of a tensor.
    """
    return _Reader().read(file)


def tensors_of(content: object) -> dict[str, StoredTensor]:
    """The tensors of a state dict by name.

    Raises:
        PickleError: If it is something else.
    """
    if not isinstance(content, dict):
        raise PickleError(
            f"holds {_kind(content)}, not a state dict; save the model's state_dict() instead"
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, StoredTensor):
            raise PickleError(
                f"holds {_kind(value)} as {shortened(name)}, where a state dict has tensors; "
                "save the model's state_dict() alone"
            )
        _check_name(name)
    return content


def _check_name(name: str) -> None:
    """Refuse a name that safetensors cannot hold."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise PickleError(f"has a tensor whose name is no text: {shortened(name)}") from error
    if len(name) > _MAX_NAME or name == _RESERVED_NAME:
        raise PickleError(
            f"has a tensor {shortened(name)}, a name that safetensors cannot hold: rename it"
        )


class _Reader:
    """A stack machine, as pickles are written for; it only knows what torch writes."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._work = 0
        self._simple: dict[str, Callable[[], Any]] = {
            "NONE": lambda: None,
            "NEWFALSE": lambda: False,
            "NEWTRUE": lambda: True,
            "EMPTY_DICT": dict,
            "EMPTY_LIST": list,
            "EMPTY_TUPLE": tuple,
            "EMPTY_SET": lambda: _Other("a set"),
            "MARK": _Mark,
            "TUPLE": lambda: tuple(self._pop_to_mark()),
            "TUPLE1": lambda: tuple(self._pop_items(1)),
            "TUPLE2": lambda: tuple(self._pop_items(2)),
            "TUPLE3": lambda: tuple(self._pop_items(3)),
            "BINPERSID": lambda: _storage(self._pop()),
            "REDUCE": self._reduce,
            "NEWOBJ": self._reduce,
        }

    def read(self, file: BinaryIO) -> Any:  # noqa: ANN401
        try:
            for code, argument, _ in pickletools.genops(file):
                self._add_work(1)
                if code.name == "STOP":
                    return self._pop()
                self._follow(code.name, argument)
        except (ValueError, OverflowError) as error:
            raise PickleError(f"has a damaged pickle ({error}); download it again") from error
        raise PickleError("has a pickle without an end; download it again")

    def _add_work(self, amount: int) -> None:
        self._work += amount
        if self._work > _MAX_OPERATIONS:
            raise PickleError(
                f"has a pickle of more than {_MAX_OPERATIONS:,} operations: "
                "save it in several shards"
            )

    def _follow(self, operation: str, argument: Any) -> None:  # noqa: ANN401, C901
        match operation:
            case "PROTO":
                pass
            case "GLOBAL":
                self._stack.append(_find(argument))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._top()
            case "BINGET" | "LONG_BINGET":
                if argument not in self._memo:
                    raise _damaged()
                self._stack.append(self._memo[argument])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                self._stack.append(argument)
            case "SHORT_BINSTRING":  # a string of Python 2
                self._stack.append(argument.encode("latin-1").decode())
            case "APPEND":
                self._extend(self._pop_items(1))
            case "APPENDS":
                self._extend(self._pop_to_mark())
            case "SETITEM":
                self._set(self._pop_items(2))
            case "SETITEMS":
                self._set(self._pop_to_mark())
            case "BUILD":  # attributes, such as a state dict's _metadata
                self._pop_items(1)
                self._top()
            case _ if operation in self._simple:
                self._stack.append(self._simple[operation]())
            case _:
                raise PickleError(f"has the pickle operation {operation}, which torch never writes")

    def _top(self) -> Any:  # noqa: ANN401
        if not self._stack or isinstance(self._stack[-1], _Mark):
            raise _damaged()
        return self._stack[-1]

    def _pop(self) -> Any:  # noqa: ANN401
        self._top()
        return self._stack.pop()

    def _pop_items(self, count: int) -> list[Any]:
        return [self._pop() for _ in range(count)][::-1]

    def _pop_to_mark(self) -> list[Any]:
        items = []
        while self._stack and not isinstance(self._stack[-1], _Mark):
            items.append(self._stack.pop())
        if not self._stack:
            raise _damaged()
        self._stack.pop()
        return items[::-1]

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self._top(), list):
            raise _damaged()
        self._stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        if not isinstance(self._top(), dict) or len(items) % 2:
            raise _damaged()
        _fill(self._stack[-1], zip(items[::2], items[1::2], strict=True))

    def _reduce(self) -> Any:  # noqa: ANN401
        called, arguments = self._pop_items(2)
        if not isinstance(called, _Global) or not isinstance(arguments, tuple):
            raise _damaged()
        for argument in _all_arguments(arguments):
            # a few bytes can ask again and again for a copy of a long list
            if isinstance(argument, tuple | list):
                self._add_work(_COPYING * len(argument))
        return _call(called.name, arguments)


def _all_arguments(arguments: tuple[Any, ...]) -> Iterable[Any]:
    """Arguments of a call, and those of the call that `REBUILD_TYPE` passes on."""
    inner = arguments[2] if len(arguments) > 2 else None
    return (*arguments, *inner) if isinstance(inner, tuple) else arguments


def _fill(fields: dict[Any, Any], items: Iterable[Any]) -> None:
    for item in items:
        if not isinstance(item, tuple | list) or len(item) != 2 or not _is_key(item[0]):
            raise _damaged()
        fields[item[0]] = item[1]


def _is_key(value: object) -> bool:
    """Tell what is quickly hashed, and not to what a thousand other keys are."""
    return type(value) is str or (type(value) is int and abs(value) < sys.hash_info.modulus)


def _find(argument: str) -> _Global:
    module, _, name = argument.partition(" ")
    full = f"{_PYTHON_2.get(module, module)}.{name}"
    if full not in ALLOWED:
        raise PickleError(
            f"its pickle calls {full:.120}, which would run code: emp-llm runs none and reads "
            "state dicts of tensors only; get the weights as safetensors from their makers"
        )
    return _Global(full)


def _call(name: str, arguments: tuple[Any, ...]) -> Any:  # noqa: ANN401
    if name == ORDERED_DICT:
        fields: dict[Any, Any] = {}
        if arguments:
            _fill(fields, arguments[0] if isinstance(arguments[0], list) else [None])
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
        rebuild, kind, inner, _ = arguments
        if kind not in map(_Global, TENSORS):
            return _Other(kind.name if isinstance(kind, _Global) else "a tensor of another class")
        # not the same function again, which could go on forever
        if isinstance(rebuild, _Global) and isinstance(inner, tuple) and rebuild.name != name:
            return _call(rebuild.name, inner)
        raise _damaged()
    wraps = (f"{REBUILD}parameter", f"{REBUILD}parameter_with_state", *TENSORS)
    if name in wraps and arguments and isinstance(arguments[0], StoredTensor):
        return arguments[0]
    return _Other(name)


def _storage(identity: object) -> Storage:
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise _damaged()
    _, kind, key, _, count, *view = identity
    if not isinstance(kind, _Global) or not isinstance(key, str) or not _is_size(count):
        raise _damaged()
    if view and view[0] is not None:
        raise PickleError("was saved by a torch before 0.4: load it with torch and save it again")
    dtype = None if kind.name in UNTYPED else STORAGES.get(kind.name.rpartition(".")[2])
    if dtype is None and kind.name not in UNTYPED:
        raise PickleError(f"has a {kind.name}, which safetensors do not know: convert it first")
    return Storage(key, dtype, count * (ITEM_BITS[dtype] // 8 if dtype else 1))


def _check_plain(metadata: Sequence[object]) -> None:
    """Refuse a tensor that is not what its bytes say, but their negative or conjugate."""
    if any(metadata):
        raise PickleError(
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
        raise _damaged()
    if not _are_sizes(shape) or not _are_sizes(strides) or len(shape) != len(strides):
        raise _damaged()
    name = _dtype(storage, dtype)
    item = ITEM_BITS[name] // 8
    sizes, places = tuple(shape), _strides(shape, strides, item)
    reach = sum((size - 1) * stride for size, stride in zip(sizes, places, strict=True)) + item
    start = offset * item
    if 0 not in sizes and start + reach > storage.nbytes:
        raise PickleError(
            f"has a tensor that ends at byte {start + reach:,} of a storage of "
            f"{storage.nbytes:,} bytes; download it again"
        )
    return StoredTensor(storage, name, start, sizes, places)


def _dtype(storage: Storage, dtype: object) -> str:
    if storage.dtype is not None and dtype is None:
        return storage.dtype
    if not isinstance(dtype, _Global):
        raise _damaged()
    name = DTYPES.get(dtype.name.removeprefix("torch."))
    if name is None:
        raise PickleError(f"has a tensor of {dtype.name}, which safetensors do not know")
    return name


def _strides(shape: Sequence[int], strides: Sequence[int], item: int) -> tuple[int, ...]:
    """Strides in bytes; those that nothing depends on are made dense."""
    items = 1
    for size in shape:
        items *= size
        if items > _MAX_ITEMS:
            raise _damaged()
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
        and len(values) <= _MAX_DIMENSIONS
        and all(map(_is_size, values))
    )


def _damaged() -> PickleError:
    return PickleError("has a damaged pickle; download it again")


def _kind(value: object) -> str:
    if isinstance(value, _Other | _Global):
        return value.name
    return f"a {'tensor' if isinstance(value, StoredTensor) else type(value).__name__}"
