"""The model that a written folder was made from: what pruning leaves of it, compared bit by bit.

    source → decide targets → select → every block: read, prune, compare with the folder's

Nothing is written. The work on a tensor that was pruned is that of pruning it.
"""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from emp_kernels.numbers import FORMATS
from emp_kernels.rows import Bytes, Workspace

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.dtypes import ITEM_BITS
from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.small_files import CONFIG_NAME
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.errors import FormatError
from emp_llm.hub.source import Source
from emp_llm.options import PruneOptions, Repair
from emp_llm.output.sidecar_files import small_files
from emp_llm.pruning.plan import PruningPlan
from emp_llm.pruning.stages import select_targets
from emp_llm.report.fields import Report
from emp_llm.report.folder_files import describe_file
from emp_llm.report.tensor_statistics import TensorStatistics
from emp_llm.report.totals import compare_totals, mass_totals
from emp_llm.runtime.pipeline import Piece
from emp_llm.runtime.progress import SharedProgress
from emp_llm.runtime.workers import Workers
from emp_llm.selection.selection import Selection, passes
from emp_llm.tensors.bit_patterns import first_difference, in_words
from emp_llm.tensors.target import Target
from emp_llm.verification.target_comparison import (
    OTHER,
    ComparedTarget,
    GivenTarget,
    RepairedTarget,
)
from emp_llm.verification.tensor_checks import BytesCheck, RowsCheck, TensorCheck

__all__ = ["Original"]

_BYTE = 8
"""Bits."""


class Original:
    """A source, to compare a written folder with.

    Args:
        model: What the user calls it.
        source: Where it lies.
        options: The rule that the folder was pruned by.
        threads: Threads that read and compute.
        progress: Told of the selection.

    Attributes:
        name: What the user calls it.
        checkpoint: The source's.
        repaired: Tensors compared so far that have other weights than the source, as the report
            tells, or may have, where there is none.

    Raises:
        CheckpointError: If the source is none that can be pruned by this rule.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        source: Source,
        options: PruneOptions,
        threads: int,
        progress: SharedProgress,
    ) -> None:
        self.name = os.fspath(model)
        self.repaired: set[str] = set()
        self.checkpoint = source.open_checkpoint()
        self._plan = PruningPlan.make(source, self.checkpoint, options)
        self._workers = Workers(threads=threads, progress=progress)
        self._targets = {target.name: target for target in self._plan.all_targets}
        self._statistics: dict[str, TensorStatistics] = {}
        self._selection: Selection | None = None

    def select(self, files: OpenFiles) -> None:
        """Decide what stays, where the weights tell it; that may take reading them ahead."""
        if not self.masks_derived:
            return
        nbytes = passes(self._plan.options) * self._plan.bytes_to_prune(self.checkpoint.shards)
        if nbytes:
            self._workers.progress.begin("selecting", nbytes)
        targets = list(self._targets.values())
        self._selection = select_targets(self._plan, self._workers, targets, files)

    @property
    def masks_derived(self) -> bool:
        """Whether masks are decided once more: those that come from data cannot be."""
        return self._plan.options.criterion == "magnitude"

    def compare(self, check: TensorCheck, files: OpenFiles) -> Iterator[Piece]:
        """The work that checks a tensor of the folder and compares it with the source's.

        Raises:
            FormatError: If it is another kind of tensor here than there.
        """
        if check.name not in self._plan.decisions:
            raise check.fault(f"is not in {self.name}", OTHER)
        decision = self._plan.decisions[check.name]
        if decision.prune != isinstance(check, RowsCheck):
            here, there = ("is not", "is") if decision.prune else ("is", "is not")
            raise check.fault(
                f"{here} pruned, by the rule it {there} ({decision.reason}) in {self.name}", OTHER
            )
        shard, entry = self.checkpoint.tensors[check.name]
        file = files.file(shard)
        if isinstance(check, BytesCheck):
            return self._compare_bytes(check, entry, file)
        assert isinstance(check, RowsCheck)  # noqa: S101 (there are no others)
        return self._compare_rows(check, self._targets[check.name], file)

    def check_complete(
        self, written: Checkpoint, names: Collection[str], report: Report | None
    ) -> None:
        """See that nothing of the source is missing, nor other than there, beside the tensors.

        Args:
            written: The written folder.
            names: Its tensors; all have been compared.
            report: Its report. Where it has none, its configuration and small files, which
                `save_pretrained` makes anew, are not compared.

        Raises:
            CheckpointError: If a file of the source cannot be read.
            FormatError: If something is missing or differs.
        """
        missing = self._plan.decisions.keys() - names
        if missing:
            raise FormatError(
                f"{written.folder}: lacks tensor {min(missing)!r} of {self.name} "
                f"({len(missing)} missing)"
            )
        if report is None:
            return
        if self.masks_derived:
            statistics = [self._statistics[name] for name in sorted(self._statistics)]
            compare_totals(report["totals"], "targets", mass_totals(statistics))
        self._check_config(written)
        self._check_small_files(written, report["files"])

    def _check_config(self, written: Checkpoint) -> None:
        here = {**written.config, "quantization_config": None}
        there = {**self.checkpoint.config, "quantization_config": None}
        for key in sorted(here.keys() | there.keys()):
            told = [json.dumps(side.get(key), sort_keys=True) for side in (here, there)]  # 1 ≠ true
            if told[0] != told[1] or (key in here) != (key in there):
                raise FormatError(
                    f"{written.folder}: {key} in {CONFIG_NAME} is {here.get(key)!r}, in "
                    f"{self.name} it is {there.get(key)!r}"
                )

    def _check_small_files(self, written: Checkpoint, described: Mapping[str, Any]) -> None:
        names = {path.as_posix() for path in small_files(self.checkpoint)}
        made = {CONFIG_NAME, written.index_name}
        for name, fields in described.items():
            if "hash" in fields and name not in names | made:
                raise FormatError(f"{written.folder}: {name} is not in {self.name}")
        for name in sorted(names):
            if describe_file(self.checkpoint.folder / name) != described.get(name):
                state = "is not that" if name in described else "is missing, a file"
                raise FormatError(f"{written.folder}: {name} {state} of {self.name}")

    def _compare_bytes(
        self, check: BytesCheck, entry: TensorEntry, file: SourceFile
    ) -> Iterator[Piece]:
        here, there = ((e.dtype, list(e.shape)) for e in (check.entry, entry))
        if here != there:
            raise check.fault(f"is {_kind(*here)}, in {self.name} it is {_kind(*there)}", OTHER)
        if check.name.endswith("bias") and self._is_repaired(check, "bias"):
            yield from check.pieces()
            return
        compare = partial(_compare_stretch, check, entry, file, self.name)

        def settle(compared: tuple[Bytes, FormatError | None]) -> None:
            data, fault = compared
            if fault is not None:
                raise fault
            check.take(data)

        for start, nbytes in check.stretches():
            yield Piece(nbytes, partial(compare, start, nbytes), settle)
        yield Piece.note(check.conclude)

    def _compare_rows(self, check: RowsCheck, target: Target, file: SourceFile) -> Iterator[Piece]:
        here, there = (
            (geometry.number_format.name, list(geometry.shape), geometry.transposed)
            for geometry in (check.geometry, target.geometry)
        )
        if here != there:
            raise check.fault(f"is {_kind(*here)}, in {self.name} it is {_kind(*there)}", OTHER)
        repaired = self._is_repaired(check, "obs")
        if self._selection is None:
            given = GivenTarget(
                target, file, self._plan.options, check, repaired=repaired, source=self.name
            )
            yield from given.pieces()
            return
        kind = RepairedTarget if repaired else ComparedTarget
        job = kind(target, file, self._selection, check, self.name)
        yield from job.pieces()
        yield Piece.note(partial(self._note_statistics, check, job))

    def _is_repaired(self, check: TensorCheck, by: Repair) -> bool:
        """Whether a tensor has other weights than the source, by the report or for all we know."""
        repaired = repairs = self._plan.options.repair == by
        if check.fields is not None:
            repaired = check.fields.get("repaired") is True
            if repaired and not repairs:
                raise check.fault("is repaired by the report, and not by the rule", OTHER)
        if repaired:
            self.repaired.add(check.name)
        return repaired

    def _note_statistics(self, check: RowsCheck, job: ComparedTarget) -> None:
        self._statistics[check.name] = job.statistics
        check.expect(**job.statistics.to_dict())


def _compare_stretch(
    check: BytesCheck,
    entry: TensorEntry,
    file: SourceFile,
    source: str,
    start: int,
    nbytes: int,
    workspace: Workspace,
) -> tuple[Bytes, FormatError | None]:
    """A stretch of a tensor that was not pruned, and how it differs from the source's."""
    found = check.read(start, nbytes, workspace)
    expected = workspace.take("stored", nbytes)[:nbytes]
    file.read_into(entry.start + start, expected.data)
    at = first_difference(found.reshape(1, -1), expected.reshape(1, -1))
    if at is None:
        return found, None
    item = max(1, ITEM_BITS[entry.dtype] // _BYTE)
    first = at[1] - at[1] % item
    is_, must_be = (_item(data[first : first + item], entry.dtype) for data in (found, expected))
    place = _place((start + first) // item, entry)
    return found, check.fault(f"{place} is {is_}; in {source} it is {must_be}", OTHER)


def _place(number: int, entry: TensorEntry) -> str:
    """What an item is called: by its indices, if several items do not share a byte."""
    if ITEM_BITS[entry.dtype] < _BYTE:
        return f"byte {number}"
    return f"item {[int(index) for index in np.unravel_index(number, entry.shape)]}"


def _item(data: Bytes, dtype: str) -> str:
    bits = int.from_bytes(data.tobytes(), "little")
    return in_words(bits, FORMATS[dtype]) if dtype in FORMATS else f"0x{bits:0{len(data) * 2}x}"


def _kind(dtype: str, shape: list[int], transposed: bool = False) -> str:
    return f"{dtype} {shape}{' transposed' if transposed else ''}"
