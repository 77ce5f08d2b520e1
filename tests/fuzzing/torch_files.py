"""Files of torch.save whose pickle or archive is damaged: read without running them, or refused."""

import io
import pickle
import zipfile
from math import prod
from pathlib import Path
from typing import Any

import torch
from fuzzing.choices import Choices, damaged
from fuzzing.headers import check_message

from emp_llm.checkpoint.dtypes import ITEM_BITS
from emp_llm.checkpoint.torch_save.file import open_torch_file
from emp_llm.checkpoint.torch_save.header import read_torch_header, read_torch_header_by
from emp_llm.errors import EmpError

NAME = "pytorch_model.bin"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
CALLS = [
    b"os\nsystem\n",
    b"builtins\neval\n",
    b"torch\nload\n",
    b"torch._utils\n_rebuild_tensor_v2\n",
]
TOKENS = [
    *(pickle.REDUCE, pickle.BUILD, pickle.MARK, pickle.TUPLE, pickle.STOP, pickle.POP, pickle.DUP),
    *(pickle.APPENDS, pickle.SETITEMS, pickle.EMPTY_DICT, pickle.EMPTY_TUPLE, pickle.BINPERSID),
    *(pickle.NEWOBJ, pickle.STACK_GLOBAL, pickle.MEMOIZE, pickle.NONE, pickle.NEWTRUE),
    *(pickle.BININT1 + b"\xff", pickle.BININT + b"\xff" * 4, pickle.LONG1 + b"\x08" + b"\x7f" * 8),
    *(pickle.LONG4 + b"\xff\xff\xff\x7f", pickle.BINUNICODE + b"\xff\xff\xff\xff"),
    *(
        pickle.LONG_BINGET + b"\xff" * 4,
        pickle.LONG_BINPUT + b"\xff" * 4,
        pickle.FRAME + b"\xff" * 8,
    ),
    *(pickle.BINGET + b"\0", pickle.BINPUT + b"\1", pickle.EXT1 + b"\1", pickle.PERSID + b"1\n"),
    *(pickle.GLOBAL + call for call in CALLS),
    *(pickle.INST + call for call in CALLS),
]


def make_torch_file(choices: Choices, folder: Path) -> Path:
    """A file of torch.save, or nearly."""
    path = folder / NAME
    zipped = not choices.once_in(3)
    torch.save(_state(choices), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    how = choices.number(0, 5)
    if how == 0 or (how <= 3 and not zipped):
        content = damaged(choices, content, TOKENS)
    elif how <= 3:
        content = _repacked(choices, content)
    path.write_bytes(content[: choices.place(len(content) + 1)] if how == 4 else content)
    return path


def _state(choices: Choices) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for number in range(choices.number(0, 4)):
        shape = [choices.number(0, 3) for _ in range(choices.number(0, 3))]
        tensor = torch.arange(prod(shape)).reshape(shape).to(choices.pick(DTYPES))
        if shape and choices.once_in(3):
            tensor = choices.pick([tensor.mT if len(shape) > 1 else tensor[::2], tensor[1:]])
        state[f"t{number}"] = torch.nn.Parameter(tensor, False) if choices.once_in(4) else tensor
        if state and choices.once_in(4):
            state["tied"] = state[choices.pick(sorted(state))]
    if choices.once_in(12):
        state["odd"] = choices.pick([1, "text", None, [1], {"a": 1}, torch.Size([1])])
    return state


def _repacked(choices: Choices, content: bytes) -> bytes:
    """The archive again, one of its files damaged."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(target, "w") as new:
        names = old.namelist()
        chosen = choices.pick([*names, *[name for name in names if name.endswith("data.pkl")] * 9])
        for name in names:
            data = old.read(name)
            new.writestr(name, damaged(choices, data, TOKENS) if name == chosen else data)
    return target.getvalue()


def check_torch_file(path: Path) -> bool:
    """Read a file as `prune` does, to its last byte; returns whether it was taken.

    Raises:
        AssertionError: If a tensor is not of its size, or nothing of the file is where it says.
    """
    content = path.read_bytes()
    try:
        header = read_torch_header(path)
    except EmpError as error:
        check_message(error, NAME)
        return False
    by_range = read_torch_header_by(lambda a, b: content[a:b], NAME, len(content))
    assert by_range == header
    for entry in header.tensors:
        assert entry.nbytes * 8 == prod(entry.shape) * ITEM_BITS[entry.dtype]
        assert entry.start >= 0
    try:
        file = open_torch_file(path)
    except EmpError as error:
        check_message(error, NAME)
        return False
    try:
        for entry in header.tensors:
            buffer = bytearray(entry.nbytes)
            file.read_into(entry.start, memoryview(buffer))
    finally:
        file.close()
    return True
