"""Checks of the files of a written folder, apart from the tensors in them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.small_files import CONFIG_NAME
from emp_llm.checkpoint.weight_files import read_index
from emp_llm.errors import FormatError
from emp_llm.output.sidecar_files import small_files
from emp_llm.report.fields import FileFields
from emp_llm.report.file_names import NOT_AS_WRITTEN, OF_THEIR_OWN, REPORT_NAME
from emp_llm.report.folder_files import describe_file, visible_files

__all__ = [
    "changed_files",
    "check_index",
    "check_no_other_weights",
    "check_same_config",
    "check_same_small_files",
    "check_written_alike",
    "file_fault",
    "other_files",
]

_WEIGHTS = re.compile(r"[^/]*\.safetensors(\.index\.json)?|pytorch_model[^/]*\.bin(\.index\.json)?")
"""Names in the folder itself that some program would load as weights of the model."""


def changed_files(checkpoint: Checkpoint, described: Mapping[str, FileFields]) -> tuple[str, ...]:
    """Configuration and small files that are missing, or not as the report describes them."""
    folder = checkpoint.folder
    return tuple(
        name
        for name, fields in described.items()
        if name != checkpoint.index_name
        and "hash" in fields  # otherwise it is a shard, whose tensors are checked
        and not ((folder / name).is_file() and describe_file(folder / name) == fields)
    )


def file_fault(folder: Path, name: str) -> FormatError:
    """The error that names a small file which has changed."""
    state = "is not as it was written" if (folder / name).is_file() else "is missing"
    return FormatError(
        f"{folder}: {name} {state}, by {REPORT_NAME}; take it from the source, "
        f"prune again, or delete {REPORT_NAME} if another model was saved over the pruned one"
    )


def other_files(
    checkpoint: Checkpoint, described: Mapping[str, FileFields] | None
) -> tuple[str, ...]:
    """Paths of visible files that neither the checkpoint nor the report accounts for."""
    known = {*_weights_files(checkpoint), CONFIG_NAME, *OF_THEIR_OWN, *(described or {})}
    if described is None:
        known.update(path.as_posix() for path in checkpoint.other_files)
    return tuple(name for name in visible_files(checkpoint.folder) if name not in known)


def check_no_other_weights(checkpoint: Checkpoint) -> None:
    """Check that the folder has no further file that some program would load as its weights.

    Raises:
        FormatError: If it has one.
    """
    known = _weights_files(checkpoint)
    for name in visible_files(checkpoint.folder):
        if _WEIGHTS.fullmatch(name) and name not in known:
            raise FormatError(
                f"{checkpoint.folder}: {name} is not a part of the checkpoint, yet some programs "
                "would load it; take it out of the folder"
            )


def check_index(checkpoint: Checkpoint, *, sizes: bool) -> None:
    """Check that the index, if there is one, names every tensor and its shard.

    Args:
        checkpoint: The checkpoint.
        sizes: Whether to check its ``total_size``; some programs write a wrong one.

    Raises:
        FormatError: If something in it is wrong.
    """
    if checkpoint.index_name is None:
        return
    stated, metadata = read_index(checkpoint.folder / checkpoint.index_name)
    for name, (shard, _) in checkpoint.tensors.items():
        if stated.get(name) != shard.name:
            raise FormatError(
                f"{checkpoint.index_name}: says tensor {name!r} is in {stated.get(name)}; "
                f"it is in {shard.name}"
            )
    if sizes and metadata.get("total_size") != checkpoint.nbytes:
        raise FormatError(
            f"{checkpoint.index_name}: total_size is {metadata.get('total_size')}, the tensors "
            f"have {checkpoint.nbytes} bytes"
        )


def check_written_alike(checkpoint: Checkpoint, described: Mapping[str, FileFields]) -> None:
    """Check that shards' headers and the index are, byte for byte, as the report describes them.

    Raises:
        FormatError: If one is not.
    """
    for name in sorted(_weights_files(checkpoint)):
        found, stated = describe_file(checkpoint.folder / name), described.get(name)
        if found != stated:
            raise FormatError(
                f"{checkpoint.folder}: {name} has {found}, {REPORT_NAME} says {stated}: "
                f"{NOT_AS_WRITTEN}"
            )


def check_same_config(written: Checkpoint, source: Checkpoint, name: str) -> None:
    """Check that a folder's configuration is its source's, but for what says that it is packed.

    Args:
        written: The folder.
        source: The checkpoint that it was made from.
        name: What the user calls that.

    Raises:
        FormatError: If a field is another one.
    """
    here = {**written.config, "quantization_config": None}
    there = {**source.config, "quantization_config": None}
    for key in sorted(here.keys() | there.keys()):
        # as JSON, since for Python 1 and true are equal
        found, expected = (json.dumps(side.get(key), sort_keys=True) for side in (here, there))
        if found != expected or (key in here) != (key in there):
            raise FormatError(
                f"{written.folder}: {key} in {CONFIG_NAME} is {here.get(key)!r}, in "
                f"{name} it is {there.get(key)!r}"
            )


def check_same_small_files(
    written: Checkpoint, described: Mapping[str, FileFields], source: Checkpoint, name: str
) -> None:
    """Check that a folder's small files, as its report describes them, are its source's.

    Args:
        written: The folder.
        described: What its report says of its files.
        source: The checkpoint that it was made from.
        name: What the user calls that.

    Raises:
        CheckpointError: If a file of the source cannot be read.
        FormatError: If a file is missing, or is another one, or is not the source's.
    """
    files = {path.as_posix() for path in small_files(source)}
    made = {CONFIG_NAME, written.index_name}
    for file, fields in described.items():
        if "hash" in fields and file not in files | made:
            raise FormatError(f"{written.folder}: {file} is not in {name}")
    for file in sorted(files):
        if describe_file(source.folder / file) != described.get(file):
            state = "is not that" if file in described else "is missing, a file"
            raise FormatError(f"{written.folder}: {file} {state} of {name}")


def _weights_files(checkpoint: Checkpoint) -> set[str]:
    index = [checkpoint.index_name] if checkpoint.index_name else []
    return {*index, *(shard.name for shard in checkpoint.shards)}
