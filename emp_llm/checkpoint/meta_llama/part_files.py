"""The files of a checkpoint in Meta's original format: params.json and its parts."""

import re
from collections.abc import Iterable

from emp_llm.checkpoint.meta_llama.params import PARAMS_NAME
from emp_llm.errors import CheckpointError

__all__ = ["is_original", "is_part", "part_names"]

_PART = re.compile(r"consolidated\.(\d\d)\.pth")


def is_original(names: Iterable[str]) -> bool:
    """Whether a folder without a config.json is in Meta's format, by the names of its files."""
    return any(name == PARAMS_NAME or is_part(name) for name in names)


def is_part(name: str) -> bool:
    """Whether a file is a part of the weights, by its name."""
    return _PART.fullmatch(name) is not None


def part_names(names: Iterable[str], where: object) -> list[str]:
    """The names of all parts, in order.

    Args:
        names: The names of all files.
        where: The folder or repository, for errors.

    Raises:
        CheckpointError: If params.json or a part is missing.
    """
    names = set(names)
    parts = sorted(filter(is_part, names))
    if PARAMS_NAME not in names:
        raise CheckpointError(
            f"{where}: has {parts[0]}, which is in Meta's original format, but no {PARAMS_NAME}, "
            "which belongs to it: put it in the folder, or give the model in Hugging Face's layout"
        )
    count = 1 + max((int(part.split(".")[1]) for part in parts), default=0)
    expected = [f"consolidated.{number:02}.pth" for number in range(count)]
    missing = [name for name in expected if name not in names]
    if missing:
        raise CheckpointError(
            f"{where}: has {PARAMS_NAME}, so it is in Meta's original format, but no {missing[0]} "
            f"({len(missing)} of {count} parts missing): download it again, or give the model in "
            "Hugging Face's layout"
        )
    return expected
