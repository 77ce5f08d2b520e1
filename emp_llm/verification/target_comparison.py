"""Targets of a source, each compared with the same tensor of a written folder.

ComparedTarget    masks are computed again, and kept weights are the source's
RepairedTarget    masks are computed again, and kept weights have changed
GivenTarget       masks came from data: what can be checked without them
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from emp_kernels.dispatch import count_rows, prune_rows, select_rows
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.numbers import NumberFormat
from emp_kernels.rows import Given, Patterns, PerRow, RowStatistics, Threshold, Workspace

from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.errors import FormatError
from emp_llm.options import PruneOptions, counts_magnitudes
from emp_llm.pruning.target_job import TargetJob
from emp_llm.report.fields import TensorFields
from emp_llm.runtime.pipeline import Piece
from emp_llm.selection.allocation import spread
from emp_llm.selection.selection import Selection
from emp_llm.tensors.bit_patterns import first_difference, in_words
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.row_reader import block_memory
from emp_llm.tensors.target import Target
from emp_llm.verification.tensor_checks import NOT_OF_SOURCE, CheckedRows, RowsCheck

__all__ = ["ComparedTarget", "GivenTarget", "RepairedTarget"]

Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _ComparedRows(RowStatistics):
    """A row block, what is stored of it, and how it differs from what pruning leaves."""

    checked: CheckedRows
    fault: FormatError | None


class ComparedTarget(TargetJob[_ComparedRows]):
    """Prunes a target, and compares it with the rows of a written folder.

    Args:
        target: The tensor in the source.
        file: Its file.
        selection: What to keep.
        check: The tensor in the folder.
        source: What the source is called, for errors.
    """

    def __init__(
        self,
        target: Target,
        file: SourceFile,
        selection: Selection,
        check: RowsCheck,
        source: str,
    ) -> None:
        super().__init__(target, file, selection)
        self._check = check
        self._source = source

    def compute(self, block: RowBlock, weights: Patterns, workspace: Workspace) -> _ComparedRows:
        """Statistics of a row block, and whether its weights are the same in both."""
        geometry = self.target.geometry
        rule = self._selection.rule(self.target, block)
        memory = block_memory(geometry, block, workspace, "stored")
        checked = self._check.read(block, workspace, memory)
        pruned = prune_rows(weights, geometry.number_format, rule, out=weights, workspace=workspace)
        at = first_difference(checked.rows, pruned.weights)
        fault = None
        if at is not None:
            fault = self._differs(block, *at, int(checked.rows[at]), int(pruned.weights[at]))
        return _ComparedRows(pruned.table, pruned.stats, checked, fault)

    def _differs(
        self, block: RowBlock, row: int, column: int, found: int, expected: int
    ) -> FormatError:
        is_, must_be = _both(self.target, found, expected)
        because = ""
        if not expected:
            because = ", for the rule prunes it"
        elif not found:
            because = ", for the rule keeps it"
        return self._check.fault(
            f"{_place(self.target, block, row, column)} is {is_}, but pruning {self._source} gives "
            f"{must_be}{because}",
            NOT_OF_SOURCE,
        )

    def settle(self, _block: RowBlock, rows: _ComparedRows) -> None:
        """Take note of what is stored; in order, so that of several faults the first is raised."""
        if rows.fault is not None:
            raise rows.fault
        self._check.take(rows.checked)

    def settle_end(self) -> tuple[int, None]:
        """Bytes of the tensor in the folder."""
        self._check.conclude()
        return self._check.nbytes, None


class RepairedTarget(ComparedTarget):
    """A target whose masks the rule gives, and whose kept weights have changed."""

    def compute(self, block: RowBlock, weights: Patterns, workspace: Workspace) -> _ComparedRows:
        """Statistics of a row block, and whether it keeps what the rule keeps."""
        geometry = self.target.geometry
        rule = self._selection.rule(self.target, block)
        memory = block_memory(geometry, block, workspace, "stored")
        checked = self._check.read(block, workspace, memory)
        scores = geometry.number_format.magnitudes(weights).astype(np.float32)
        if isinstance(rule, Given):
            raise TypeError("masks from data cannot be computed again")
        decided = select_rows(
            scores.view(np.uint32), _of_scores(rule, geometry.number_format), workspace=workspace
        )
        bits = np.unpackbits(decided.mask, axis=1, count=geometry.columns, bitorder="little")
        # the mask is compared one way only: repair may have made a kept weight zero
        fault = None
        if (at := _first((checked.rows != 0) & (bits == 0))) is not None:
            fault = self._differs(block, *at, int(checked.rows[at]), 0)
        kept = self._check.kept_rows(block)
        if fault is None and kept is not None:
            fault = _other_count(
                self._check, self.target, block, kept != decided.table[:, 0], kept, self._source
            )
        return _ComparedRows(decided.table, decided.stats, checked, fault)


def _of_scores(rule: PerRow | Threshold, number_format: NumberFormat) -> PerRow | Threshold:
    """The rule on magnitudes as float32, whose bit patterns have the same order."""
    if isinstance(rule, PerRow):
        return rule
    key = np.array([rule.key], number_format.storage)
    magnitude = number_format.magnitudes(key).astype(np.float32)
    return Threshold(int(magnitude.view(np.uint32)[0]), rule.ties)


class GivenTarget:
    """Compares a target whose masks came from data.

    If it was not repaired, each of its weights must be the source's or +0.0. Where magnitudes were
    counted, or each row keeps the same share, rows must keep as many weights as these say.

    Args:
        target: The tensor in the source.
        file: Its file.
        options: The rule that the folder was pruned by.
        check: The tensor in the folder; it says whether its kept weights have changed.
        source: What the source is called, for errors.
    """

    def __init__(
        self,
        target: Target,
        file: SourceFile,
        options: PruneOptions,
        check: RowsCheck,
        source: str,
    ) -> None:
        self._target = target
        self._file = file
        self._counts = _counts(target, options, check.fields)
        self._check = check
        self._repaired = check.repaired
        self._source = source

    def pieces(self) -> Iterator[Piece]:
        """The work, in order."""
        geometry = self._target.geometry
        for block in geometry.row_blocks():
            yield Piece(geometry.block_bytes(block), partial(self._compare, block), self._settle)
        yield Piece.note(self._check.conclude)

    def _compare(
        self, block: RowBlock, workspace: Workspace
    ) -> tuple[CheckedRows, FormatError | None]:
        geometry, source = self._target.geometry, self._source
        weights = self._target.read(self._file, block, workspace)
        checked = self._check.read(
            block, workspace, block_memory(geometry, block, workspace, "stored")
        )
        found = checked.rows
        if not self._repaired and (at := _first((found != weights) & (found != 0))) is not None:
            is_, was = _both(self._target, int(found[at]), int(weights[at]))
            place = _place(self._target, block, *at)
            what = f"{place} is {is_}; in {source} it is {was}, of which pruning leaves that or 0.0"
            return checked, self._check.fault(what, NOT_OF_SOURCE)
        if self._counts is None:
            return checked, None
        kept = self._check.kept_rows(block)
        try:
            counts = self._counts(block, weights)
        except NonFiniteRowError as error:
            raise self._target.not_finite(block, error) from error
        if kept is not None:
            bad = kept != counts
        else:  # a dense row does not say which of its zeros are kept weights
            kept = np.count_nonzero(found, axis=1)
            key_mask = geometry.number_format.storage.type(geometry.number_format.key_mask)
            zeros = geometry.columns if self._repaired else (weights & key_mask == 0).sum(axis=1)
            bad = (kept > counts) | (kept + zeros < counts)
        return checked, _other_count(self._check, self._target, block, bad, kept, source)

    def _settle(self, compared: tuple[CheckedRows, FormatError | None]) -> None:
        checked, fault = compared
        if fault is not None:
            raise fault
        self._check.take(checked)


def _counts(
    target: Target, options: PruneOptions, fields: TensorFields | None
) -> Callable[[RowBlock, Patterns], Counts] | None:
    """How many weights each row of a row block keeps, int64 [R]; None where only data say so."""
    geometry = target.geometry
    if options.granularity != "row" or not counts_magnitudes(options):
        return None
    if options.allocate == "uniform":
        # the target's own number is known from the report alone
        if fields is None:
            return None
        rows = spread(fields["kept"], geometry.matrices * geometry.matrix_rows)
        first = geometry.first_row
        return lambda block, _: rows[first(block) : first(block) + block.stop - block.start]
    beta = options.beta
    if options.allocate == "loss":
        own = fields.get("beta") if fields is not None and fields["pruned"] else None
        if own is None:
            return None
        beta = own
    return lambda _, weights: count_rows(weights, geometry.number_format, [beta]).kept[:, 0]


def _first(bad: Mask) -> tuple[int, int] | None:
    """Row and column of the first of some weights, bool [R, C]; None if there is none."""
    if not bad.any():
        return None
    row, column = np.unravel_index(int(bad.argmax()), bad.shape)
    return int(row), int(column)


def _place(target: Target, block: RowBlock, row: int, column: int) -> str:
    return f"row {target.geometry.first_row(block) + row:,} column {column:,}"


def _both(target: Target, found: int, expected: int) -> tuple[str, str]:
    is_, must_be = (in_words(bits, target.geometry.number_format) for bits in (found, expected))
    return is_, must_be


def _other_count(
    check: RowsCheck,
    target: Target,
    block: RowBlock,
    bad: Mask,
    kept: npt.NDArray[np.int64],
    source: str,
) -> FormatError | None:
    """The error that names the first of the bad rows, bool [R]; None if there is none."""
    if not bad.any():
        return None
    row = int(bad.argmax())
    return check.fault(
        f"row {target.geometry.first_row(block) + row:,} keeps {kept[row]:,} weights, which is not "
        f"what the rule gives it in {source}",
        NOT_OF_SOURCE,
    )
