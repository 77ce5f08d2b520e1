"""Small files that are there whole or not at all, whatever happens to the machine."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["flush_path", "write_json_durably"]

_UNFINISHED = ".writing"


def write_json_durably(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one step: it is on disk, under its name, when this returns.

    Raises:
        OSError: If it cannot be written; what was there before is there still.
    """
    unfinished = path.with_name(path.name + _UNFINISHED)
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    flush_path(path.parent)


def flush_path(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk. OSErrors pass."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
