"""Is a written folder whole? Hashes, structure, and the mask of every packed row.

report → shards' headers → every tensor: its bytes' hash, its rows decoded, its kept weights
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from emp_kernels.dispatch import Workspace
from emp_kernels.numbers import FORMATS
from emp_kernels.rows import Patterns

from emp_llm.checkpoint import Checkpoint, Shard, open_checkpoint, read_json_object
from emp_llm.companions import REPORT_NAME
from emp_llm.errors import CheckpointError, FormatError
from emp_llm.files import OpenFiles
from emp_llm.geometry import Block, Geometry
from emp_llm.packed import quantization_config
from emp_llm.packed_reader import PackedReader, open_shard
from emp_llm.pipeline import Piece, run_pieces, thread_count
from emp_llm.progress import Progress, Silent
from emp_llm.prune_steps import COPY_BYTES, hash_name, new_hash
from emp_llm.report import count_totals
from emp_llm.safetensors_header import TensorEntry
from emp_llm.source_file import SourceFile

__all__ = ["shard_checks", "verify"]


def verify(
    folder: str | os.PathLike[str],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prove a folder that `prune` or `unpack` wrote whole.

    Checked are the index against the shards, the configuration and the report against each other,
    the checksum of every tensor, the structure of every packed row (mask, counts, escapes, finite
    values) and the number of weights it keeps.

    Args:
        folder: The folder.
        threads: Threads that read and decode; all cores by default.
        progress: Told how the work goes on.

    Returns:
        What was checked: ``tensors``, ``pruned_tensors``, ``rows``, ``kept`` and ``bytes``.

    Raises:
        CheckpointError: If it is no checkpoint, or was not written by emp-llm.
        FormatError: At the first thing that is not as it was written.
    """
    progress = progress or Silent()
    checkpoint = open_checkpoint(Path(folder))
    report = _read_report(checkpoint)
    _check_config(checkpoint, report)
    checks: list[_Check] = []
    with OpenFiles() as files:

        def pieces() -> Iterator[Piece]:
            for shard in checkpoint.shards:
                for check in shard_checks(shard, files.file(shard), report["tensors"]):
                    checks.append(check)
                    yield from check.pieces()

        progress.begin("verifying", checkpoint.nbytes)
        run_pieces(pieces(), threads=thread_count(threads), progress=progress.advance)
    _check_complete(report, checks)
    pruned = [check for check in checks if check.fields["pruned"]]
    return {
        "tensors": len(checks),
        "pruned_tensors": len(pruned),
        "rows": sum(check.fields["rows"] for check in pruned),
        "kept": sum(check.fields["kept"] for check in pruned),
        "bytes": checkpoint.nbytes,
    }


def _read_report(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.folder / REPORT_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint.folder}: has no {REPORT_NAME}, so there is nothing to verify it against; "
            "give a folder that `emp-llm prune` or `emp-llm unpack` wrote"
        )
    report = read_json_object(path)
    try:
        well_formed = (
            report["format"] in ("packed", "dense")
            and isinstance(report["rule"], dict)
            and all(isinstance(report["totals"][part], dict) for part in ("targets", "model"))
            and all(map(_is_well_formed, report["tensors"].values()))
        )
    except (KeyError, TypeError, AttributeError):
        well_formed = False
    if not well_formed:
        raise FormatError(f"{path}: is not a report that emp-llm wrote; prune again")
    return report


def _is_well_formed(fields: Mapping[str, Any]) -> bool:
    """Whether what a report says of a tensor has the parts, of the types, that are used here."""
    names = ["weights", "kept", "bytes_before", "bytes_after"]
    if fields["pruned"]:
        names.append("rows")
    numbers = [*(fields[name] for name in names), *fields["shape"]]
    strings = [fields["dtype"], fields["hash"]]
    flags = [fields["pruned"], fields["transposed"] if fields["pruned"] else False]
    return (
        all(type(number) is int and number >= 0 for number in numbers)
        and all(isinstance(string, str) for string in strings)
        and all(isinstance(flag, bool) for flag in flags)
        and not (fields["pruned"] and (len(fields["shape"]) < 2 or 0 in fields["shape"]))
    )


def _check_config(checkpoint: Checkpoint, report: Mapping[str, Any]) -> None:
    """A packed folder must say so, and by the rule it was pruned by; a dense one must not."""
    found = checkpoint.config.get("quantization_config")
    expected = quantization_config(report["rule"]) if report["format"] == "packed" else None
    if found != expected:
        raise FormatError(
            f"{checkpoint.folder}: quantization_config in config.json is {found}, by the report it "
            f"must be {expected}: one of the two files is not the one that was written"
        )


def shard_checks(shard: Shard, file: SourceFile, tensors: Mapping[str, Any]) -> "Iterator[_Check]":
    """What is to be checked of a written shard, whose tensors a report tells of.

    Raises:
        FormatError: If the shard or one of its tensors is not what the report says.
    """
    readers, plain = open_shard(shard, file)
    for name in [*readers, *(entry.name for entry in plain)]:
        if name not in tensors:
            raise FormatError(f"{shard.name}: tensor {name!r} is not in {REPORT_NAME}")
    for name, reader in readers.items():
        yield _PackedCheck(shard.name, tensors[name], reader)
    for entry in plain:
        yield _PlainCheck(file, tensors[entry.name], entry)


def _check_complete(report: Mapping[str, Any], checks: "list[_Check]") -> None:
    missing = report["tensors"].keys() - {check.name for check in checks}
    if missing:
        raise FormatError(
            f"tensor {min(missing)!r} is in {REPORT_NAME} and in no shard ({len(missing)} missing)"
        )
    for part, counted in zip(("targets", "model"), count_totals(report["tensors"]), strict=True):
        told = report["totals"][part]
        for name, value in counted.items():
            if told.get(name) != value:
                raise FormatError(
                    f"{REPORT_NAME}: {name} of {part} is {told.get(name)}, its tensors add up to "
                    f"{value}: the report is not as it was written"
                )


class _Check(ABC):
    """What one tensor is checked for.

    Attributes:
        name: The tensor.
        fields: What the report says of it.
    """

    def __init__(self, where: str, name: str, fields: Mapping[str, Any], nbytes: int) -> None:
        self.name = name
        self.fields = fields
        self._where = where
        self._checksum = new_hash()
        weights = math.prod(fields["shape"])
        counted = {"bytes_after": nbytes, "weights": weights}
        if fields["pruned"]:
            columns = fields["shape"][-2 if fields["transposed"] else -1]
            counted["rows"] = weights // columns
        else:
            counted |= {"kept": weights, "bytes_before": nbytes}
        for count, value in counted.items():
            self.expect(count, value)

    def pieces(self) -> Iterator[Piece]:
        """The work, in order."""
        yield from self.parts()
        yield Piece.note(self.conclude)

    @abstractmethod
    def parts(self) -> Iterator[Piece]:
        """The work that gives the checksum."""

    def conclude(self) -> None:
        """Compare the checksum; all parts are settled."""
        found = hash_name(self._checksum)
        if found != self.fields["hash"]:
            raise self.fault(f"has the hash {found}, the report says {self.fields['hash']}")

    def expect(self, count: str, found: int) -> None:
        """Compare a number with the report's."""
        if found != self.fields[count]:
            raise self.fault(f"has {count} = {found:,}, the report says {self.fields[count]:,}")

    def fault(self, what: str) -> FormatError:
        """The error that tells what is wrong with the tensor."""
        return FormatError(
            f"{self._where}: tensor {self.name!r} {what}: the folder is not as it was written; "
            "download or prune it again"
        )


class _PlainCheck(_Check):
    """The bytes of a tensor that is stored plainly."""

    def __init__(self, file: SourceFile, fields: Mapping[str, Any], entry: TensorEntry) -> None:
        super().__init__(file.name, entry.name, fields, entry.nbytes)
        if entry.dtype != fields["dtype"] or list(entry.shape) != fields["shape"]:
            raise self.fault(
                f"is {entry.dtype} {list(entry.shape)}, the report says {fields['dtype']} "
                f"{fields['shape']}"
            )
        if fields["pruned"]:
            self.expect("bytes_before", entry.nbytes)
            if entry.dtype not in FORMATS:
                raise self.fault(f"is {entry.dtype}, which emp-llm does not prune")
        self._file = file
        self._entry = entry
        self._non_zero = 0

    def parts(self) -> Iterator[Piece]:
        """The bytes as they lie; of a tensor that was pruned, its rows."""
        entry = self._entry
        if self.fields["pruned"]:
            geometry = Geometry(
                number_format=FORMATS[entry.dtype],
                shape=entry.shape,
                transposed=self.fields["transposed"],
            )
            for block in geometry.blocks():
                read = partial(self._read_rows, geometry, block)
                yield Piece(geometry.block_bytes(block), read, self._take_rows)
            return
        for start in range(entry.start, entry.end, COPY_BYTES):
            nbytes = min(COPY_BYTES, entry.end - start)
            yield Piece(nbytes, partial(self._read, start, nbytes), self._take)

    def _read(self, start: int, nbytes: int, workspace: Workspace) -> memoryview:
        data = workspace.take("weights", nbytes)[:nbytes].data
        self._file.read_into(start, data)
        return data

    def _read_rows(self, geometry: Geometry, block: Block, workspace: Workspace) -> Patterns:
        buffer = workspace.take("weights", geometry.block_bytes(block))
        return geometry.read(self._file, self._entry.start, block, buffer)

    def _take_rows(self, weights: Patterns) -> None:
        self._non_zero += int(np.count_nonzero(weights))
        self._checksum.update(weights.data)

    def conclude(self) -> None:
        """Compare the checksum, and see that no more weights are left than are said to be kept."""
        super().conclude()
        if self._non_zero > self.fields["kept"]:
            raise self.fault(
                f"has {self._non_zero:,} weights that are not zero, the report says it keeps "
                f"{self.fields['kept']:,}"
            )

    def _take(self, data: memoryview) -> None:
        self._checksum.update(data)


class _PackedCheck(_Check):
    """The planes of a packed tensor, each row of them decoded."""

    def __init__(self, where: str, fields: Mapping[str, Any], reader: PackedReader) -> None:
        super().__init__(where, reader.name, fields, reader.planes.nbytes)
        geometry = reader.geometry
        found = (geometry.number_format.name, list(geometry.shape), geometry.transposed)
        expected = (fields["dtype"], fields["shape"], fields.get("transposed"))
        if found != expected:
            raise self.fault(f"is packed as {found}, the report says {expected}")
        self.expect("kept", reader.kept)
        self.expect("bytes_before", geometry.nbytes)
        self._reader = reader

    def parts(self) -> Iterator[Piece]:
        """Records block by block, then what is behind them."""
        for block in self._reader.geometry.blocks():
            nbytes = self._reader.block_bytes(block)
            yield Piece(nbytes, partial(self._decode, block), self._checksum.update)
        yield Piece.note(lambda: self._checksum.update(self._reader.end_bytes))

    def _decode(self, block: Block, workspace: Workspace) -> Any:  # noqa: ANN401 (an array)
        records = self._reader.records(block, workspace)
        self._reader.decode(block, records, workspace)
        return records
