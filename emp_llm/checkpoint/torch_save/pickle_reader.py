"""The pickle of a torch checkpoint, read without running it.

The standard library takes the pickle apart into its operations. Those that
``torch.load(weights_only=True)`` allows are followed here, on plain values. Nothing that a pickle
names is imported or called, and names that are not allowed are refused.
"""

import pickletools
from collections.abc import Callable, Iterable
from typing import BinaryIO, Final

from emp_llm.checkpoint.header import UnreadableError
from emp_llm.checkpoint.torch_save.names import ALLOWED
from emp_llm.checkpoint.torch_save.pickled_tensors import (
    NamedObject,
    OtherObject,
    call,
    damaged,
    fill_dict,
    find_storage,
)

__all__ = ["MAX_PICKLE_BYTES", "read_pickle"]

MAX_PICKLE_BYTES: Final = 16 << 20
"""The longest pickle that is read; one of 10,000 tensors is 3 MB long."""

_MAX_OPERATIONS = 4_000_000
_COPYING = 8  # copying an item counts as so many operations: it takes that much more memory

_PYTHON_2 = {"__builtin__": "builtins"}
_CONSTANTS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")


class _Mark:
    """Where the items of a list, dict or tuple begin on the stack."""


def read_pickle(file: BinaryIO) -> object:
    """Read one pickle of a torch checkpoint; the file is then at the byte behind it.

    Returns:
        What it holds: plain values, with a `StoredTensor` for each tensor.

    Raises:
        UnreadableError: If it is damaged, or names anything that tensors do not consist of.
    """
    return _Reader().read(file)


class _Reader:
    """The stack machine that pickles are written for, with the operations that torch uses."""

    def __init__(self) -> None:
        self._stack: list[object] = []
        self._memo: dict[object, object] = {}
        self._work = 0
        # What an operation pushes, given its argument.
        self._pushed: dict[str, Callable[[object], object]] = {
            "NONE": lambda _: None,
            "NEWFALSE": lambda _: False,
            "NEWTRUE": lambda _: True,
            **dict.fromkeys(_CONSTANTS, lambda argument: argument),
            # a string of Python 2
            "SHORT_BINSTRING": lambda argument: str(argument).encode("latin-1").decode(),
            "EMPTY_DICT": lambda _: {},
            "EMPTY_LIST": lambda _: [],
            "EMPTY_TUPLE": lambda _: (),
            "EMPTY_SET": lambda _: OtherObject("a set"),
            "MARK": lambda _: _Mark(),
            "TUPLE": lambda _: tuple(self._pop_to_mark()),
            "TUPLE1": lambda _: tuple(self._pop_items(1)),
            "TUPLE2": lambda _: tuple(self._pop_items(2)),
            "TUPLE3": lambda _: tuple(self._pop_items(3)),
            "GLOBAL": lambda argument: _find(str(argument)),
            "BINGET": self._recall,
            "LONG_BINGET": self._recall,
            "BINPERSID": lambda _: find_storage(self._pop()),
            "REDUCE": lambda _: self._reduce(),
            "NEWOBJ": lambda _: self._reduce(),
        }
        # What an operation does to what is on the stack.
        self._done: dict[str, Callable[[object], None]] = {
            "PROTO": lambda _: None,
            "BINPUT": self._remember,
            "LONG_BINPUT": self._remember,
            "APPEND": lambda _: self._extend(self._pop_items(1)),
            "APPENDS": lambda _: self._extend(self._pop_to_mark()),
            "SETITEM": lambda _: self._set(self._pop_items(2)),
            "SETITEMS": lambda _: self._set(self._pop_to_mark()),
            "BUILD": lambda _: self._drop_attributes(),
        }

    def read(self, file: BinaryIO) -> object:
        try:
            for code, argument, _ in pickletools.genops(file):
                self._add_work(1)
                if code.name == "STOP":
                    return self._pop()
                self._follow(code.name, argument)
        except (ValueError, OverflowError) as error:
            raise UnreadableError(f"has a damaged pickle ({error}); download it again") from error
        raise UnreadableError("has a pickle without an end; download it again")

    def _add_work(self, amount: int) -> None:
        self._work += amount
        if self._work > _MAX_OPERATIONS:
            raise UnreadableError(
                f"has a pickle of more than {_MAX_OPERATIONS:,} operations: "
                "save it in several shards"
            )

    def _follow(self, operation: str, argument: object) -> None:
        if operation in self._pushed:
            self._stack.append(self._pushed[operation](argument))
        elif operation in self._done:
            self._done[operation](argument)
        else:
            raise UnreadableError(f"has the pickle operation {operation}, which torch never writes")

    def _remember(self, key: object) -> None:
        self._memo[key] = self._top()

    def _recall(self, key: object) -> object:
        if key not in self._memo:
            raise damaged()
        return self._memo[key]

    def _top(self) -> object:
        if not self._stack or isinstance(self._stack[-1], _Mark):
            raise damaged()
        return self._stack[-1]

    def _pop(self) -> object:
        self._top()
        return self._stack.pop()

    def _pop_items(self, count: int) -> list[object]:
        return [self._pop() for _ in range(count)][::-1]

    def _pop_to_mark(self) -> list[object]:
        items = []
        while self._stack and not isinstance(self._stack[-1], _Mark):
            items.append(self._stack.pop())
        if not self._stack:
            raise damaged()
        self._stack.pop()
        return items[::-1]

    def _extend(self, items: list[object]) -> None:
        extended = self._top()
        if not isinstance(extended, list):
            raise damaged()
        extended.extend(items)

    def _set(self, items: list[object]) -> None:
        fields = self._top()
        if not isinstance(fields, dict) or len(items) % 2:
            raise damaged()
        fill_dict(fields, zip(items[::2], items[1::2], strict=True))

    def _drop_attributes(self) -> None:
        """Leave out an object's attributes, such as a state dict's _metadata."""
        self._pop_items(1)
        self._top()

    def _reduce(self) -> object:
        called, arguments = self._pop_items(2)
        if not isinstance(called, NamedObject) or not isinstance(arguments, tuple):
            raise damaged()
        for argument in _all_arguments(arguments):
            # a few bytes of a pickle can ask for copies of a long list, over and over
            if isinstance(argument, tuple | list):
                self._add_work(_COPYING * len(argument))
        return call(called.name, arguments)


def _all_arguments(arguments: tuple[object, ...]) -> Iterable[object]:
    """Arguments of a call, and those of the call that `REBUILD_TYPE` passes on."""
    inner = arguments[2] if len(arguments) > 2 else None
    return (*arguments, *inner) if isinstance(inner, tuple) else arguments


def _find(argument: str) -> NamedObject:
    module, _, name = argument.partition(" ")
    full = f"{_PYTHON_2.get(module, module)}.{name}"
    if full not in ALLOWED:
        raise UnreadableError(
            f"its pickle calls {full:.120}, which would run code: emp-llm runs none and reads "
            "state dicts of tensors only; get the weights as safetensors from their makers"
        )
    return NamedObject(full)
