"""The header of a safetensors file, read with every check, and written.

A file consists of 8 bytes (the header's length, little-endian), the header (a JSON object, maybe
padded with spaces at its end) and the tensors' data, without holes. No tensor data is read here.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeGuard

from emp_llm.checkpoint.dtypes import ITEM_BITS
from emp_llm.checkpoint.header import (
    DOWNLOAD_AGAIN,
    MAX_DIMENSIONS,
    MAX_NAME,
    METADATA_KEY,
    Header,
    ReadRange,
    TensorEntry,
    UnreadableError,
    check_no_pointer,
    open_ranges,
    unreadable_named,
)
from emp_llm.checkpoint.json_files import MAX_JSON_BYTES, Json, JsonError, check_size, parse_json
from emp_llm.errors import CheckpointError
from emp_llm.messages import shortened

__all__ = [
    "ALIGNMENT",
    "encode_header",
    "read_header",
    "read_header_by",
]

ALIGNMENT: Final = 16
"""Behind a header that is written here, data starts at a multiple of so many bytes."""

_LENGTH_BYTES = 8
_MAX_U64 = 2**64 - 1


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    All that the safetensors library checks when it opens a file is checked. Names that occur twice
    and tensors that are not JSON objects, which it accepts, are refused as well.

    Args:
        path: The file. Only its header is read.

    Returns:
        The header, whose tensors cover the file's data exactly, without holes or overlaps.

    Raises:
        CheckpointError: If the file cannot be read or is not a whole safetensors file.
    """
    with open_ranges(path) as (read, file_size):
        return read_header_by(read, path.name, file_size)


def read_header_by(read: ReadRange, name: str, file_size: int) -> Header:
    """Read and check the header of a safetensors file that is anywhere; see `read_header`.

    Args:
        read: Reads a range of the file.
        name: The file's name, for errors.
        file_size: Bytes of the whole file.

    Raises:
        CheckpointError: If it is not a whole safetensors file.
    """
    with unreadable_named(name):
        check_no_pointer(read)
        length = _header_length(read(0, _LENGTH_BYTES), file_size)
        fields = _parse(read(_LENGTH_BYTES, _LENGTH_BYTES + length))
        metadata = _metadata(fields.pop(METADATA_KEY, None))
        data_start = _LENGTH_BYTES + length
        tensors = tuple(
            sorted(
                (_entry(name, field, data_start) for name, field in fields.items()),
                key=lambda entry: (entry.start, entry.end, entry.name),
            )
        )
        _check_cover(tensors, data_start, file_size)
    return Header(metadata, tensors, data_start, file_size)


def _header_length(head: bytes, file_size: int) -> int:
    if file_size < _LENGTH_BYTES:
        raise UnreadableError(
            f"is {file_size} bytes, too short for a safetensors file; {DOWNLOAD_AGAIN}"
        )
    length: int = struct.unpack_from("<Q", head)[0]
    if length > MAX_JSON_BYTES:
        raise UnreadableError(
            f"says its header is {length:,} bytes long, over the limit of {MAX_JSON_BYTES:,}; "
            "this is not a safetensors file: download or convert it again"
        )
    if _LENGTH_BYTES + length > file_size:
        raise UnreadableError(
            f"is {file_size:,} bytes, its header alone needs {_LENGTH_BYTES + length:,}; "
            f"{DOWNLOAD_AGAIN}"
        )
    return length


def _parse(text: bytes) -> dict[str, Json]:
    try:
        fields = parse_json(text, strict=True)
    except JsonError as error:
        raise UnreadableError(f"its header {error}; {DOWNLOAD_AGAIN}") from error
    if not isinstance(fields, dict):
        raise UnreadableError(
            f"its header is {shortened(fields)}; it must be a JSON object: convert it again"
        )
    return fields


def _metadata(field: Json) -> dict[str, str]:
    if field is None:
        return {}
    if not isinstance(field, dict):
        raise UnreadableError(
            f"its {METADATA_KEY} is {shortened(field)}; it must map strings to strings"
        )
    strings: dict[str, str] = {}
    for key, value in field.items():
        if not isinstance(value, str):
            raise UnreadableError(
                f"its {METADATA_KEY} has {shortened(value)} at {shortened(key)}; "
                "values must be strings: save the checkpoint again with strings only"
            )
        strings[key] = value
    return strings


def _entry(name: str, field: Json, data_start: int) -> TensorEntry:
    if not isinstance(field, dict):
        raise UnreadableError(f"tensor {shortened(name)} is {shortened(field)}; {DOWNLOAD_AGAIN}")
    if len(name) > MAX_NAME:
        raise UnreadableError(
            f"tensor {shortened(name)} has a name of {len(name):,} characters, more than "
            f"{MAX_NAME:,}: rename it"
        )
    dtype, shape, offsets = field.get("dtype"), field.get("shape"), field.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise UnreadableError(
            f"tensor {shortened(name)} has dtype {shortened(dtype)}, which is not one of "
            f"safetensors' {', '.join(ITEM_BITS)}: save it in one of these"
        )
    if not _are_sizes(shape):
        raise UnreadableError(
            f"tensor {shortened(name)} has shape {shortened(shape)}; "
            f"sizes must be whole numbers from 0; {DOWNLOAD_AGAIN}"
        )
    if len(shape) > MAX_DIMENSIONS:
        raise UnreadableError(
            f"tensor {shortened(name)} has {len(shape):,} dimensions, more than {MAX_DIMENSIONS}"
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UnreadableError(
            f"tensor {shortened(name)} has data_offsets {shortened(offsets)}; "
            f"they must be its first byte and the byte behind its last; {DOWNLOAD_AGAIN}"
        )
    try:
        nbytes = _nbytes(dtype, shape)
    except ValueError as error:
        raise UnreadableError(f"tensor {shortened(name)} {error}; {DOWNLOAD_AGAIN}") from error
    start, end = offsets
    if end - start != nbytes:
        raise UnreadableError(
            f"tensor {shortened(name)} has {end - start:,} bytes of data, "
            f"{dtype} {shortened(shape)} needs {nbytes:,}; {DOWNLOAD_AGAIN}"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + start, data_start + end)


def _are_sizes(sizes: object) -> TypeGuard[list[int]]:
    # type() rather than isinstance(): true is an int to Python
    return isinstance(sizes, list) and all(
        type(size) is int and 0 <= size <= _MAX_U64 for size in sizes
    )


def _nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor; raises ValueError if that is not a whole number, or exceeds 64 bits."""
    items = 1
    for size in shape:
        items *= size
        if items > _MAX_U64:  # as the library does: a size of zero further on does not help
            break
    bits = items * ITEM_BITS[dtype]
    if bits > _MAX_U64:
        raise ValueError("has a shape whose product overflows 64 bits")
    if bits % 8:
        raise ValueError(f"has {items:,} items of {dtype}, which do not fill whole bytes")
    return bits // 8


def _check_cover(tensors: tuple[TensorEntry, ...], data_start: int, file_size: int) -> None:
    # a hole could carry anything past a reader, and the safetensors library refuses it, too
    position = data_start
    for entry in tensors:
        if entry.start != position:
            problem = "overlaps another" if entry.start < position else "follows a hole"
            raise UnreadableError(
                f"tensor {shortened(entry.name)} {problem}: it starts at byte {entry.start:,}, "
                f"not {position:,}; {DOWNLOAD_AGAIN}"
            )
        position = entry.end
    if position != file_size:
        raise UnreadableError(
            f"is {file_size:,} bytes, its header promises {position:,}: download it again"
        )


def encode_header(
    entries: Iterable[tuple[str, str, tuple[int, ...], int]],
    metadata: Mapping[str, str] | None = None,
    *,
    reserve: int | None = None,
) -> bytes:
    """Write the header of a safetensors file: everything that comes before the data.

    Args:
        entries: Name, dtype, shape and bytes of each tensor, in the order of their data, which
            must follow the header without holes.
        metadata: Strings for ``__metadata__``; the field is left out if there are none.
        reserve: Bytes that the result must have, a multiple of `ALIGNMENT`. So room can be left for
            a header that is only known once the data behind it is written.

    Returns:
        The 8 bytes of the length and the JSON, padded with spaces to ``reserve`` bytes, or else
        to the next multiple of `ALIGNMENT`.

    Raises:
        ValueError: If an entry contradicts itself or occurs twice, or a header does not fit in
            ``reserve``.
        CheckpointError: If the header or a name would be too long for `read_header`.
    """
    fields: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape, nbytes in entries:
        if name in fields or name == METADATA_KEY:
            raise ValueError(f"two tensors are called {name!r}")
        if len(name) > MAX_NAME:
            raise CheckpointError(
                f"{shortened(name)} would have a name of {len(name):,} characters, more than "
                f"{MAX_NAME:,}: rename it in the source"
            )
        if nbytes != _nbytes(dtype, shape):
            raise ValueError(f"{name!r}: {dtype} {shape} is not {nbytes} bytes")
        offsets = (position, position + nbytes)
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        position += nbytes
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    needed = _LENGTH_BYTES + len(text)
    total = -(-needed // ALIGNMENT) * ALIGNMENT if reserve is None else reserve
    if total < needed or total % ALIGNMENT:
        raise ValueError(f"the header needs {needed} bytes, {total} were reserved")
    padded = text.ljust(total - _LENGTH_BYTES)
    try:
        check_size(padded)
    except JsonError as error:
        raise CheckpointError(
            f"the header of a shard to be written {error}: save the source in more shards"
        ) from error
    return struct.pack("<Q", len(padded)) + padded
