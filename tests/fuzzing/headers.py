"""Safetensors headers: read as the library reads them, or refused; and what is read is sound."""

import re
import struct
from math import prod
from typing import Any

import safetensors
from fuzzing.choices import Choices
from fuzzing.json_inputs import NAMES, spoiled, text_of

from emp_llm.checkpoint.dtypes import ITEM_BITS
from emp_llm.checkpoint.header import Header
from emp_llm.checkpoint.safetensors_header import encode_header, read_header_by
from emp_llm.errors import EmpError

ONLY_OURS = re.compile(
    r"has .+ twice|dimensions, more than|characters, more than|tensor .+ is \["  # [dtype, shape, …]
)
"""Refusals of what the library takes."""


def make_header(choices: Choices) -> bytes:
    """A file that is a safetensors file, or nearly."""
    fields, data = _fields(choices)
    whole = choices.once_in(8)
    for _ in range(0 if whole else choices.pick([0, 1, 1, 1, 2, 3])):
        fields = spoiled(choices, fields)
    text = text_of(choices, fields)
    if choices.once_in(4):
        text += b" " * choices.number(1, 16)
    length = choices.pick([len(text)] * 12 + [len(text) + 1, len(text) - 1, 0, 1 << 63, 64_000_001])
    size = choices.pick([data] * 8 + [data + 1, max(data - 1, 0), 0])
    content = struct.pack("<Q", length % 2**64) + text + bytes(size)
    return content[: choices.place(len(content) + 1)] if choices.once_in(20) else content


def _fields(choices: Choices) -> tuple[dict[str, Any], int]:
    fields: dict[str, Any] = {}
    if choices.once_in(3):
        fields["__metadata__"] = {"format": "pt", choices.pick(NAMES): choices.pick(NAMES)}
    at = 0
    for _ in range(choices.number(0, 5)):
        name = choices.pick(NAMES) if choices.once_in(3) else f"t{choices.number(0, 99)}"
        if name in fields or name == "__metadata__":
            continue
        dtype = choices.pick(sorted(ITEM_BITS))
        shape = [choices.number(0, 3) for _ in range(choices.number(0, 3))]
        if choices.once_in(10):  # a shape without items, however large its sizes are
            shape = [abs(choices.edge()) for _ in range(choices.number(1, 3))]
            shape.insert(choices.place(len(shape) + 1), 0)
        bits = prod(shape) * ITEM_BITS[dtype]
        if bits % 8 and not choices.once_in(4):
            shape.append(4)
            bits *= 4
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + bits // 8]}
        at += bits // 8
    return fields, at


def check_header(content: bytes) -> bool:
    """Read a file's header; returns whether it was taken.

    Raises:
        AssertionError: If what was read is not sound, or not what the library reads.
    """
    theirs = _read_by_library(content)
    try:
        header = read_header_by(lambda start, stop: content[start:stop], "x.st", len(content))
    except EmpError as error:
        why = check_message(error, "x.st")
        if theirs is not None and not ONLY_OURS.search(why):
            raise AssertionError(f"the library takes it: {why}") from error
        return False
    _check_sound(header, content)
    if theirs is None:  # to the library -0 is no whole number, to Python it is 0
        assert b"-0" in content, "the library refuses it"
        return True
    found = {entry.name: (entry.dtype, list(entry.shape)) for entry in header.tensors}
    assert found == {name: (fields["dtype"], fields["shape"]) for name, fields in theirs.items()}
    for entry in header.tensors:
        assert bytes(theirs[entry.name]["data"]) == content[entry.start : entry.end]
    _check_written_again(header)
    return True


def check_message(error: EmpError, *names: str) -> str:
    """See that an error is one printable line that names the file; returns it."""
    text = str(error)
    assert text.isprintable(), text
    assert len(text) <= 4000, text
    assert any(name in text for name in names), text
    return text


def _read_by_library(content: bytes) -> dict[str, Any] | None:
    try:
        return dict(safetensors.deserialize(content))
    except safetensors.SafetensorError:
        return None


def _check_sound(header: Header, content: bytes) -> None:
    at = 8 + int.from_bytes(content[:8], "little")
    assert header.data_start == at
    for entry in header.tensors:
        assert entry.start == at
        assert entry.end >= at
        assert (entry.end - at) * 8 == prod(entry.shape) * ITEM_BITS[entry.dtype]
        at = entry.end
    assert at == len(content) == header.file_size
    assert len({entry.name for entry in header.tensors}) == len(header.tensors)
    assert all(type(part) is str for item in header.metadata.items() for part in item)


def _check_written_again(header: Header) -> None:
    entries = [(e.name, e.dtype, e.shape, e.nbytes) for e in header.tensors]
    text = encode_header(entries, header.metadata)
    size = len(text) + sum(entry.nbytes for entry in header.tensors)
    again = read_header_by(lambda start, stop: text[start:stop], "x.st", size)
    assert [(e.name, e.dtype, e.shape, e.nbytes) for e in again.tensors] == entries
    assert again.metadata == header.metadata
