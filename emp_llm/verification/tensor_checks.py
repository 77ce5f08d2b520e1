"""The check of one tensor of a written folder, in pieces; see `emp_llm.runtime.pipeline`.

RowsCheck    a tensor that was pruned: every row, decoded where it is packed
WholeCheck   a tensor that was packed without being pruned: every record, decoded
BytesCheck   any other tensor, byte by byte
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from emp_kernels.numbers import FORMATS
from emp_kernels.rows import Bytes, Patterns, Workspace

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.errors import FormatError
from emp_llm.files.checksum import COPY_BYTES, hash_name, new_hash
from emp_llm.report.fields import TensorFields
from emp_llm.report.file_names import NOT_AS_WRITTEN, REPORT_NAME
from emp_llm.report.tensor_statistics import TensorStatistics, ratio
from emp_llm.runtime.pipeline import Piece
from emp_llm.tensors.geometry import Geometry, RowBlock
from emp_llm.tensors.packed_reader import PackedReader, open_shard
from emp_llm.tensors.row_reader import PlainReader, RowReader, StoredRows
from emp_llm.tensors.whole_reader import WholeReader

__all__ = [
    "NOT_OF_SOURCE",
    "BytesCheck",
    "CheckedRows",
    "RowsCheck",
    "TensorCheck",
    "WholeCheck",
    "shard_checks",
]

NOT_OF_SOURCE = "prune or pack it again, or give the source that it was made from"
"""The remedy where a tensor is whole, and is not what pruning the source gives."""


class _Check(ABC):
    """The check of one tensor.

    Args:
        where: Its file.
        name: The tensor.
        fields: What the report says of it; None if there is no report.
        nbytes: Bytes that are stored of it.

    Attributes:
        name: The tensor.
        nbytes: Bytes that are stored of it.
        fields: What the report says of it.
        repaired: Whether it has other weights than the source gives, by the report; a comparison
            with the source sets it anew.
    """

    def __init__(self, where: str, name: str, fields: TensorFields | None, nbytes: int) -> None:
        self.name = name
        self.nbytes = nbytes
        self.fields = fields
        self.repaired = fields is not None and bool(fields.get("repaired"))
        self._where = where
        self._checksum = new_hash()
        self.expect(bytes_after=nbytes)
        if fields is not None:
            self._expect_counts(fields)

    def _expect_counts(self, fields: TensorFields) -> None:
        """Compare what the report says of the tensor with what follows from its shape."""
        weights = math.prod(fields["shape"])
        self.expect(weights=weights)
        if fields["pruned"]:
            columns = fields["shape"][-2 if fields["transposed"] else -1]
            sparsity = ratio(weights - fields["kept"], weights)
            self.expect(rows=weights // columns, sparsity=sparsity)
        else:
            self.expect(kept=weights)

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """The work, in order."""

    def conclude(self) -> None:
        """Compare the checksum; all parts have been taken note of."""
        if self.fields is None:
            return
        found = hash_name(self._checksum)
        if found != self.fields["hash"]:
            raise self.fault(f"has the hash {found}, the report says {self.fields['hash']}")

    def expect(self, **statistics: object) -> None:
        """Compare fields of the report, if there is one, with what was found."""
        if self.fields is None:
            return
        for name, found in statistics.items():
            stated = self.fields.get(name)
            if found != stated:
                raise self.fault(f"has {name} = {found}, the report says {stated}")

    def fault(self, what: str, remedy: str = NOT_AS_WRITTEN) -> FormatError:
        """The error that says what is wrong with the tensor."""
        return FormatError(f"{self._where}: tensor {self.name!r} {what}: {remedy}")


class CheckedRows(NamedTuple):
    """A row block that was read.

    Attributes:
        stored: uint8 [bytes], what is stored of it.
        rows: uint16 or uint32 [rows, columns], its weights' bit patterns.
        non_zero: How many of the patterns are not 0.
    """

    stored: Bytes
    rows: Patterns
    non_zero: int


class RowsCheck(_Check):
    """Every row of a tensor that was pruned, and how many weights are left in them.

    Args:
        where: Its file.
        reader: The tensor.
        fields: What the report says of it; None if there is no report.
        kept: How many of its weights are kept.

    Attributes:
        geometry: How its rows lie.
        rows: How many there are.
        kept: How many of its weights are kept.
        statistics: What pruning the source gave; None unless that was done once more.
    """

    statistics: TensorStatistics | None = None

    def __init__(
        self, where: str, reader: RowReader, fields: TensorFields | None, *, kept: int
    ) -> None:
        super().__init__(where, reader.name, fields, reader.nbytes)
        self.geometry = reader.geometry
        self.rows = reader.geometry.rows
        self.kept = kept
        self._reader = reader
        self._non_zero = 0

    def pieces(self) -> Iterator[Piece]:
        """The work, row block by row block."""
        for block in self.geometry.row_blocks():
            yield Piece(self._reader.block_bytes(block), partial(self.read, block), self.take)
        yield Piece.note(self.conclude)

    def read(
        self, block: RowBlock, workspace: Workspace, memory: Patterns | None = None
    ) -> CheckedRows:
        """Read a row block; on any thread. Arguments are those of `RowReader.read`."""
        stored, rows = self._reader.read(block, workspace, memory)
        return CheckedRows(stored, rows, int(np.count_nonzero(rows)))

    def kept_rows(self, block: RowBlock) -> npt.NDArray[np.int64] | None:
        """Weights that each row of a row block keeps, int64 [R]; None where they are not stored."""
        return self._reader.kept_rows(block)

    def take(self, block: CheckedRows) -> None:
        """Take note of a row block; in order."""
        self._non_zero += block.non_zero
        self._checksum.update(block.stored.data)

    def conclude(self) -> None:
        """Compare the checksum, and check that no more weights are left than are kept."""
        self._checksum.update(self._reader.end_bytes)
        super().conclude()
        # fewer are possible: a kept weight may be zero in the source
        if self._non_zero > self.kept:
            raise self.fault(
                f"has {self._non_zero:,} weights that are not zero, the report says it keeps "
                f"{self.kept:,}"
            )


class WholeCheck(_Check):
    """Every record of a tensor that was packed without being pruned.

    Args:
        where: Its file.
        reader: The tensor.
        fields: What the report says of it; None if there is no report.

    Attributes:
        geometry: How its rows lie.
    """

    def __init__(self, where: str, reader: WholeReader, fields: TensorFields | None) -> None:
        super().__init__(where, reader.name, fields, reader.nbytes)
        self.geometry = reader.geometry
        self._reader = reader

    def pieces(self) -> Iterator[Piece]:
        """The work, row block by row block."""
        for block in self.geometry.row_blocks():
            yield Piece(self._reader.block_bytes(block), partial(self.read, block), self.take)
        yield Piece.note(self.conclude)

    def read(
        self, block: RowBlock, workspace: Workspace, memory: Patterns | None = None
    ) -> StoredRows:
        """Read a row block; on any thread. Arguments are those of `RowReader.read`."""
        return self._reader.read(block, workspace, memory)

    def take(self, block: StoredRows) -> None:
        """Take note of a row block; in order."""
        self._checksum.update(block.stored.data)

    def conclude(self) -> None:
        """Compare the checksum."""
        self._checksum.update(self._reader.end_bytes)
        super().conclude()


class BytesCheck(_Check):
    """The bytes of a tensor that was not pruned.

    Args:
        where: Its file's name.
        file: Its file.
        entry: Its place there.
        fields: What the report says of it; None if there is no report.
    """

    def __init__(
        self, where: str, file: SourceFile, entry: TensorEntry, fields: TensorFields | None
    ) -> None:
        super().__init__(where, entry.name, fields, entry.nbytes)
        self.entry = entry
        self._file = file

    def pieces(self) -> Iterator[Piece]:
        """The work, a stretch at a time; none of it if there is no checksum to compare."""
        if self.fields is None:
            return
        for start, nbytes in self.stretches():
            yield Piece(nbytes, partial(self.read, start, nbytes), self.take)
        yield Piece.note(self.conclude)

    def stretches(self) -> Iterator[tuple[int, int]]:
        """Where the stretches of bytes start in the tensor, and how long they are."""
        for start in range(0, self.entry.nbytes, COPY_BYTES):
            yield start, min(COPY_BYTES, self.entry.nbytes - start)

    def read(self, start: int, nbytes: int, workspace: Workspace) -> Bytes:
        """Read a stretch, uint8; on any thread. It lies in the workspace."""
        data = workspace.take("weights", nbytes)[:nbytes]
        self._file.read_into(self.entry.start + start, data.data)
        return data

    def take(self, data: Bytes) -> None:
        """Take note of a stretch; in order."""
        self._checksum.update(data.data)


TensorCheck = RowsCheck | WholeCheck | BytesCheck
"""The check of one tensor."""


def shard_checks(
    shard: Shard, file: SourceFile, tensors: Mapping[str, TensorFields] | None
) -> Iterator[TensorCheck]:
    """The checks of a shard's tensors, the packed ones first.

    Args:
        shard: A shard of a written folder.
        file: Its file.
        tensors: What the report says of each tensor; None if there is no report, so that packed
            tensors are the pruned ones.

    Raises:
        CheckpointError: If the file cannot be read.
        FormatError: If a tensor is not the one that the report describes.
    """
    readers, plain = open_shard(shard, file)
    if tensors is not None:
        for name in [*readers, *(entry.name for entry in plain)]:
            if name not in tensors:
                raise FormatError(f"{shard.name}: tensor {name!r} is not in {REPORT_NAME}")
    fields = tensors or {}
    for name, reader in readers.items():
        if isinstance(reader, WholeReader):
            yield _whole_check(shard.name, reader, fields.get(name))
        else:
            yield _packed_check(shard.name, reader, fields.get(name))
    for entry in plain:
        yield _plain_check(shard.name, file, entry, fields.get(entry.name))


def _packed_check(where: str, reader: PackedReader, fields: TensorFields | None) -> RowsCheck:
    check = RowsCheck(where, reader, fields, kept=reader.kept)
    if fields is not None:
        geometry = reader.geometry
        found = (geometry.number_format.name, list(geometry.shape), geometry.transposed)
        transposed = fields["transposed"] if fields["pruned"] else None
        expected = (fields["dtype"], fields["shape"], transposed)
        if found != expected:
            raise check.fault(f"is packed as {found}, the report says {expected}")
        check.expect(kept=check.kept, bytes_before=geometry.nbytes)
    return check


def _whole_check(where: str, reader: WholeReader, fields: TensorFields | None) -> WholeCheck:
    check = WholeCheck(where, reader, fields)
    if fields is not None:
        geometry = reader.geometry
        check.expect(
            pruned=False,
            dtype=geometry.number_format.name,
            shape=list(geometry.shape),
            bytes_before=geometry.nbytes,
        )
    return check


def _plain_check(
    where: str, file: SourceFile, entry: TensorEntry, fields: TensorFields | None
) -> TensorCheck:
    if fields is None:
        return BytesCheck(where, file, entry, None)
    bytes_check = BytesCheck(where, file, entry, fields)
    if entry.dtype != fields["dtype"] or list(entry.shape) != fields["shape"]:
        raise bytes_check.fault(
            f"is {entry.dtype} {list(entry.shape)}, the report says {fields['dtype']} "
            f"{fields['shape']}"
        )
    bytes_check.expect(bytes_before=entry.nbytes)
    if not fields["pruned"]:
        return bytes_check
    if entry.dtype not in FORMATS:
        raise bytes_check.fault(f"is {entry.dtype}, which emp-llm does not prune")
    geometry = Geometry(
        number_format=FORMATS[entry.dtype], shape=entry.shape, transposed=fields["transposed"]
    )
    return RowsCheck(where, PlainReader(file, entry, geometry), fields, kept=fields["kept"])
