"""What a report says of the files beside it, by which `verify` finds those that have changed."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from emp_llm.checkpoint.regular_file import open_regular
from emp_llm.checkpoint.safetensors_header import read_header
from emp_llm.errors import CheckpointError, FormatError
from emp_llm.files.checksum import COPY_BYTES, hash_name, new_hash
from emp_llm.report.fields import FileFields, Report
from emp_llm.report.file_names import NOT_AS_WRITTEN, OF_THEIR_OWN, REPORT_NAME

__all__ = [
    "check_described",
    "describe_file",
    "describe_files",
    "not_described",
    "visible_files",
]


_SHARD = ".safetensors"


def describe_files(folder: Path) -> dict[str, FileFields]:
    """Describe the files of a written folder, by their paths in it.

    Left out are hidden files, the model card with its figure, the report and the evaluation.

    Raises:
        CheckpointError: If one cannot be read.
    """
    return {
        name: describe_file(folder / name)
        for name in visible_files(folder)
        if name not in OF_THEIR_OWN
    }


def visible_files(folder: Path) -> list[str]:
    """Paths, in a folder, of all files in it that are not hidden nor in a hidden folder; sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in _walk(folder))


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent) / name for name in names if not name.startswith("."))


def describe_file(path: Path) -> FileFields:
    """Describe one file: its ``bytes``, and the ``hash`` of all of them.

    For safetensors it is the ``header_hash`` instead, of what comes before the tensors' data: the
    report has the hash of each tensor.

    Raises:
        CheckpointError: If it cannot be read, or has the suffix of safetensors and is none.
    """
    is_shard = path.suffix == _SHARD
    left = read_header(path).data_start if is_shard else -1
    checksum = new_hash()
    try:
        with open_regular(path) as file:
            nbytes = os.fstat(file.fileno()).st_size
            while data := file.read(min(left, COPY_BYTES) if is_shard else COPY_BYTES):
                left -= len(data)
                checksum.update(data)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if is_shard:
        return {"bytes": nbytes, "header_hash": hash_name(checksum)}
    return {"bytes": nbytes, "hash": hash_name(checksum)}


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
    shards = {
        name: fields for name, fields in report.get("files", {}).items() if "header_hash" in fields
    }
    there = [name for name in shards if (folder / name).is_file()]
    for name in there:
        with suppress(CheckpointError):
            if describe_file(folder / name) != shards[name]:
                return name
    others = sorted(path.name for path in folder.glob(f"model*{_SHARD}"))
    return others[0] if shards and others and not there else None
