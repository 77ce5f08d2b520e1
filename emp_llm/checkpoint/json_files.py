"""Untrusted JSON, parsed in bounded memory.

Three bytes of JSON can become seventy in Python, and a single character outside Latin-1 makes all
of a text two to four times as large. The limits here are far above what a checkpoint of 10^12
weights needs (210,000 tensors and 31 MB of header, if it were one file), and keep the memory that a
hostile file can take below a gigabyte.
"""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, Final, TypeAlias

from emp_llm.checkpoint.links import check_link
from emp_llm.checkpoint.regular_file import open_regular
from emp_llm.errors import CheckpointError
from emp_llm.messages import shortened

__all__ = ["MAX_JSON_BYTES", "Json", "JsonError", "check_size", "parse_json", "read_json_object"]


MAX_JSON_BYTES: Final = 64_000_000

_MAX_VALUES = 4_000_000  # counted by brackets, braces and commas; a tensor in a header has eight
_MAX_DEPTH = 100  # transformers' configs are 6 deep; json.dumps fails at about 900
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half a character; the other half may follow


Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None
"""A value of JSON, as Python reads it."""


class JsonError(ValueError):
    """Why a text cannot be parsed, to follow what it is: "is not UTF-8 text (...)"."""


def parse_json(text: bytes, *, strict: bool = False) -> Json:
    """Parse a JSON text.

    Args:
        text: UTF-8.
        strict: Whether to refuse a name that occurs twice in an object, of which Python takes the
            last, and NaN and Infinity, which JSON does not have.

    Returns:
        Its value, which can be written as JSON again.

    Raises:
        JsonError: If it is not JSON, or is larger, deeper or of more values than any checkpoint
            needs.
    """
    check_size(text)
    try:
        value: Json = json.loads(
            text.decode(),
            object_pairs_hook=_unique if strict else None,
            parse_constant=_refuse_constant if strict else None,
        )
        if _SURROGATE.search(text):  # a half without its other half cannot be written to a file
            json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise JsonError(f"is not UTF-8 text ({error.reason})") from error
    except RecursionError as error:
        raise JsonError("nests lists or objects too deep") from error
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError(f"is not JSON ({error})") from error
    if text.count(b"[") + text.count(b"{") > _MAX_DEPTH and _is_deep(value):
        raise JsonError("nests lists or objects too deep")
    return value


def check_size(text: bytes) -> None:
    """Check that a JSON text is not larger than what `parse_json` takes.

    Raises:
        JsonError: If it is.
    """
    if len(text) > MAX_JSON_BYTES:
        raise JsonError(f"is longer than the {MAX_JSON_BYTES:,} bytes that any checkpoint needs")
    if sum(map(text.count, (b"[", b"{", b","))) > _MAX_VALUES:
        raise JsonError(f"has more than the {_MAX_VALUES:,} values that any checkpoint needs")


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise JsonError(f"has {shortened(twice)} twice, so its value is ambiguous")
    return fields


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _is_deep(value: object) -> bool:
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(_MAX_DEPTH):
        level = [
            part
            for whole in level
            for part in (whole.values() if isinstance(whole, dict) else whole)
            if isinstance(part, list | dict)
        ]
        if not level:
            return False
    return True


def read_json_object(path: Path, *, strict: bool = False) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: A regular file, or a link to one of the same checkpoint.
        strict: As for `parse_json`.

    Raises:
        CheckpointError: If it cannot be read, holds anything else, or is a link out of the
            checkpoint.
    """
    check_link(path, path.parent)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size  # read(n) allocates n bytes at once
            fields = parse_json(file.read(min(size, MAX_JSON_BYTES) + 1), strict=strict)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except JsonError as error:
        raise CheckpointError(f"{path}: {error}; download it again") from error
    if not isinstance(fields, dict):
        raise CheckpointError(
            f"{path}: holds a JSON {type(fields).__name__}, not an object; download it again"
        )
    return fields
