"""What a report says of the files beside it, by which `verify` finds those that have changed."""

import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from emp_llm.checkpoint.folder_files import visible_files
from emp_llm.checkpoint.regular_file import open_regular
from emp_llm.checkpoint.safetensors_header import read_header
from emp_llm.errors import CheckpointError, FormatError
from emp_llm.files.atomic import indented
from emp_llm.files.checksum import COPY_BYTES, hash_name, new_hash
from emp_llm.report.fields import FileFields, Report
from emp_llm.report.file_names import NOT_AS_WRITTEN, OF_THEIR_OWN, REPORT_NAME

__all__ = [
    "check_described",
    "describe_file",
    "describe_files",
    "describe_json",
    "describe_shard",
    "not_described",
]


def describe_files(
    folder: Path, shards: Collection[str], known: Mapping[str, FileFields] = MappingProxyType({})
) -> dict[str, FileFields]:
    """Describe the files of a written folder, by their paths in it.

    Left out are hidden files, the model card with its figure, the report and the evaluation.

    Args:
        folder: The folder.
        shards: Names of the files that hold the weights.
        known: Files that are described already.

    Raises:
        CheckpointError: If one cannot be read.
    """
    found = dict(known)
    for name in visible_files(folder):
        if name not in OF_THEIR_OWN and name not in known:
            describe = describe_shard if name in shards else describe_file
            found[name] = describe(folder / name)
    return dict(sorted(found.items()))


def describe_file(path: Path) -> FileFields:
    """Describe one file: its ``bytes``, and the ``hash`` of all of them.

    Raises:
        CheckpointError: If it cannot be read.
    """
    nbytes, checksum = _checksum(path, -1)
    return {"bytes": nbytes, "hash": checksum}


def describe_json(content: Mapping[str, object]) -> FileFields:
    """Describe the file that `emp_llm.files.atomic.write_json` would write."""
    data = (indented(content) + "\n").encode(errors="replace")  # JSON may escape half a surrogate
    return {"bytes": len(data), "hash": hash_name(new_hash(data))}


def describe_shard(path: Path) -> FileFields:
    """Describe one file of weights: its ``bytes``, and the ``header_hash``.

    That is the checksum of what comes before the tensors' data: the report has each tensor's.

    Raises:
        CheckpointError: If it cannot be read or is not safetensors.
    """
    nbytes, checksum = _checksum(path, read_header(path).data_start)
    return {"bytes": nbytes, "header_hash": checksum}


def _checksum(path: Path, end: int) -> tuple[int, str]:
    """The size of a file, and the checksum of its bytes up to an end; of all if that is -1."""
    checksum, left = new_hash(), end
    try:
        with open_regular(path) as file:
            nbytes = os.fstat(file.fileno()).st_size
            while data := file.read(COPY_BYTES if end < 0 else min(left, COPY_BYTES)):
                left -= len(data)
                checksum.update(data)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return nbytes, hash_name(checksum)


def check_described(folder: Path, report: Report) -> None:
    """Check that a folder's weights are not others than those that its report describes.

    Raises:
        FormatError: If `not_described` finds a file.
    """
    name = not_described(folder, report)
    if name is not None:
        raise FormatError(
            f"{folder}: {name} is not the file that {REPORT_NAME} describes: {NOT_AS_WRITTEN}"
        )


def not_described(folder: Path, report: Report) -> str | None:
    """A file of weights in a folder that is another one than its report describes.

    Only sizes and headers are compared, since the data would have to be read. A file that is not
    there, or is no safetensors, such as a pointer of Git LFS, is not compared.

    Returns:
        The first such file; None if there is none.
    """
    files = report.get("files", {})
    shards = {name: fields for name, fields in files.items() if "header_hash" in fields}
    there = [name for name in shards if (folder / name).is_file()]
    for name in there:
        with suppress(CheckpointError):
            if describe_shard(folder / name) != shards[name]:
                return name
    others = {path.name for path in folder.glob("model*.safetensors")} - files.keys()
    return min(others) if shards and others and not there else None
