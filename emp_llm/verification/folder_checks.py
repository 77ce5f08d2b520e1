"""Checks of the files of a written folder, apart from the tensors in them."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.folder_files import visible_files
from emp_llm.checkpoint.left_behind import CONFIG_NAME, holds_weights
from emp_llm.checkpoint.weight_files import read_index
from emp_llm.errors import FormatError
from emp_llm.output.carried_files import carried_files
from emp_llm.report.fields import FileFields
from emp_llm.report.file_names import NOT_AS_WRITTEN, OF_THEIR_OWN, REPORT_NAME
from emp_llm.report.folder_files import describe_file, describe_shard
from emp_llm.runtime.progress import SharedProgress

__all__ = [
    "changed_files",
    "check_carried_weights",
    "check_index",
    "check_no_other_weights",
    "check_same_config",
    "check_same_files",
    "check_written_alike",
    "file_fault",
    "other_files",
]

_SHOWN = 100_000_000
"""Bytes of files that are only checked with a progress bar of their own."""

_WEIGHTS = re.compile(r"[^/]*\.safetensors(\.index\.json)?|pytorch_model[^/]*\.bin(\.index\.json)?")
"""Names in the folder itself that some program would load as weights of the model."""


def changed_files(
    checkpoint: Checkpoint, described: Mapping[str, FileFields], progress: SharedProgress
) -> tuple[str, ...]:
    """Files beside the weights that are missing, or not as the report describes them."""
    files = {
        name: fields
        for name, fields in described.items()
        # the index is checked by its content, and shards, which have no hash, tensor by tensor
        if name != checkpoint.index_name and "hash" in fields
    }
    return tuple(_differing(checkpoint.folder, files, progress))


def _differing(
    folder: Path, described: Mapping[str, FileFields], progress: SharedProgress
) -> Iterator[str]:
    """The files of a folder that are missing, or not as they are described."""
    nbytes = sum(fields["bytes"] for fields in described.values())
    if nbytes > _SHOWN:
        progress.begin("checking files", nbytes)
    for name, fields in described.items():
        if not (folder / name).is_file() or describe_file(folder / name) != fields:
            yield name
        if nbytes > _SHOWN:
            progress.advance(fields["bytes"])


def file_fault(folder: Path, name: str, report: str = REPORT_NAME) -> FormatError:
    """The error that names a file beside the weights which has changed, by a report."""
    state = "is not as it was written" if (folder / name).is_file() else "is missing"
    return FormatError(
        f"{folder}: {name} {state}, by {report}; take it from the source, run the command that "
        f"wrote it again, or delete {report} if another model was saved over the folder"
    )


def check_carried_weights(folder: Path, changed: Iterable[str]) -> None:
    """Check that none of the files that have changed holds weights, which nobody edits.

    Raises:
        FormatError: If one does.
    """
    for name in filter(holds_weights, changed):
        raise file_fault(folder, name)


def other_files(
    checkpoint: Checkpoint, described: Mapping[str, FileFields] | None
) -> tuple[str, ...]:
    """Paths of visible files that neither the checkpoint nor the report accounts for."""
    known = {*_weights_files(checkpoint), CONFIG_NAME, *OF_THEIR_OWN, *(described or {})}
    if described is None:
        known.update(path.as_posix() for path in checkpoint.other_files)
    return tuple(name for name in visible_files(checkpoint.folder) if name not in known)


def check_no_other_weights(
    checkpoint: Checkpoint, described: Mapping[str, FileFields] | None
) -> None:
    """Check that the folder has no further file that some program would load as its weights.

    Args:
        checkpoint: The folder.
        described: What its report says of its files; None if it has no report.

    Raises:
        FormatError: If it has one.
    """
    known = {*_weights_files(checkpoint), *(described or {})}
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


def check_written_alike(
    checkpoint: Checkpoint,
    described: Mapping[str, FileFields],
    report: str = REPORT_NAME,
    remedy: str = NOT_AS_WRITTEN,
) -> None:
    """Check that shards' headers and the index are, byte for byte, as a report describes them.

    Args:
        checkpoint: The checkpoint.
        described: What the report says of its files.
        report: What the report is called.
        remedy: What helps if they are not.

    Raises:
        FormatError: If one is not.
    """
    for name in sorted(_weights_files(checkpoint)):
        describe = describe_file if name == checkpoint.index_name else describe_shard
        found, stated = describe(checkpoint.folder / name), described.get(name)
        if found != stated:
            raise FormatError(
                f"{checkpoint.folder}: {name} has {found}, {report} says {stated}: {remedy}"
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


def check_same_files(
    written: Checkpoint,
    described: Mapping[str, FileFields],
    source: Checkpoint,
    name: str,
    progress: SharedProgress,
) -> None:
    """Check that the files beside a folder's weights are its source's, by the folder's report.

    Args:
        written: The folder.
        described: What its report says of its files.
        source: The checkpoint that it was made from.
        name: What the user calls that.
        progress: Shows how far the work is.

    Raises:
        CheckpointError: If a file of the source cannot be read.
        FormatError: If a file is missing, or is another one, or is not the source's.
    """
    files = {path.as_posix() for path in carried_files(source)}
    made = {CONFIG_NAME, written.index_name}
    for file, fields in described.items():
        # of Meta's format the tokenizer is converted, and what else transformers needs is made
        if "hash" in fields and file not in files | made and source.original is None:
            raise FormatError(f"{written.folder}: {file} is not in {name}")
    for file in sorted(files.difference(described)):
        raise FormatError(f"{written.folder}: {file} is missing, a file of {name}")
    same = {file: described[file] for file in sorted(files)}
    for file in _differing(source.folder, same, progress):
        raise FormatError(f"{written.folder}: {file} is not that of {name}")


def _weights_files(checkpoint: Checkpoint) -> set[str]:
    index = [checkpoint.index_name] if checkpoint.index_name else []
    return {*index, *(shard.name for shard in checkpoint.shards)}
