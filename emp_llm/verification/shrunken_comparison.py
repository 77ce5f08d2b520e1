"""Compares a folder that `shrink` wrote with its source: every kept slice, bit by bit.

source → structures and cuts, by the choices of the report → config → tensors → other files

Nothing is written. Which structures stay is taken from the report, since scores may be from data.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from emp_kernels.rows import Bytes, Workspace

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.left_behind import CONFIG_NAME
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.errors import FormatError
from emp_llm.hub.source import Source
from emp_llm.report.file_names import SHRINK_REPORT_NAME, SHRUNKEN_NOT_AS_WRITTEN
from emp_llm.report.shrink_report import ShrinkReport, StructureFields
from emp_llm.runtime.pipeline import Piece
from emp_llm.runtime.progress import SharedProgress
from emp_llm.shrinking.choice import WIDTHS, Choice, Structures
from emp_llm.shrinking.cut_parts import CutPart, cut_parts
from emp_llm.shrinking.cuts import Cut
from emp_llm.shrinking.kinds import KINDS
from emp_llm.shrinking.plan import Shrinkage, ShrinkPlan, open_source
from emp_llm.verification.bytes_comparison import difference
from emp_llm.verification.folder_checks import check_same_files
from emp_llm.verification.shrunken_folder import ShrunkenFolder
from emp_llm.verification.shrunken_report import check_numbers_of_source
from emp_llm.verification.tensor_checks import BytesCheck

__all__ = ["ShrunkenComparison", "shrunken_against"]

_NOT_OF_SOURCE = "shrink it again, or give the source that it was made from"
"""The remedy where a tensor is whole, and is not what the source has."""


@dataclass(frozen=True, kw_only=True)
class ShrunkenComparison:
    """A source that is open to compare a smaller model with; `shrunken_against` makes it.

    Attributes:
        name: What the user calls the source.
        shrinkage: What the choices of the report keep of it.
        cuts: What is kept of each tensor, by its new name.
        readers: The source's names of the matrices that read neurons or heads that go.
        files: Its files.
    """

    name: str
    shrinkage: Shrinkage
    cuts: Mapping[str, Cut]
    readers: Collection[str]
    files: OpenFiles

    def pieces(self, check: BytesCheck) -> Iterator[Piece]:
        """The work that checks a tensor of the folder and compares it with the source's.

        Raises:
            FormatError: If it is another kind of tensor than the source gives.
        """
        cut = self.cuts.get(check.name)
        if cut is None:
            raise check.fault(f"is not what stays of a tensor of {self.name}", _NOT_OF_SOURCE)
        here, there = _kind(check.entry), _kind(cut.new_entry)
        if here != there:
            raise check.fault(f"is {here}, what stays of {self.name}'s is {there}", _NOT_OF_SOURCE)
        if check.repaired:
            if cut.entry.name not in self.readers:
                what = "is repaired by the report, and reads no neurons or kv heads that went"
                raise check.fault(what, _NOT_OF_SOURCE)
            return check.pieces()
        shard, _ = self.shrinkage.plan.checkpoint.tensors[cut.entry.name]
        return _ComparedCut(check, cut, self.files.file(shard), self.name).pieces()

    def check_complete(self, written: ShrunkenFolder, progress: SharedProgress) -> None:
        """Check that no tensor is missing, the report's numbers, and the files beside it.

        Raises:
            CheckpointError: If a file of the source cannot be read.
            FormatError: If something is missing or differs.
        """
        folder = written.checkpoint.folder
        if missing := self.cuts.keys() - written.checkpoint.tensors.keys():
            raise FormatError(
                f"{folder}: lacks tensor {min(missing)!r}, which stays of {self.name} "
                f"({len(missing)} missing): {_NOT_OF_SOURCE}"
            )
        here, there = written.checkpoint.config, self.shrinkage.config
        for key in sorted(here.keys() | there.keys()):
            # as JSON, since for Python 1 and true are equal
            found, expected = (json.dumps(side.get(key), sort_keys=True) for side in (here, there))
            if found != expected or (key in here) != (key in there):
                raise FormatError(
                    f"{folder}: {key} in {CONFIG_NAME} is {here.get(key)!r}, shrinking {self.name} "
                    f"gives {there.get(key)!r}"
                )
        check_numbers_of_source(written.report, self.shrinkage, self.name)
        source, files = self.shrinkage.plan.checkpoint, written.report["files"]
        check_same_files(written.checkpoint, files, source, self.name, progress)


def _kind(entry: TensorEntry) -> str:
    return f"{entry.dtype} {list(entry.shape)}"


class _ComparedCut:
    """Checks a tensor, and compares it with what is kept of the source's.

    Args:
        check: The tensor in the folder.
        cut: What is kept of the source's.
        file: The source's file.
        source: What the source is called, for errors.
    """

    def __init__(self, check: BytesCheck, cut: Cut, file: SourceFile, source: str) -> None:
        self._check = check
        self._cut = cut
        self._file = file
        self._source = source

    def pieces(self) -> Iterator[Piece]:
        """The work, in order."""
        start = 0
        for part in cut_parts(self._cut):
            yield Piece(part.nbytes, partial(self._compare, part, start), self._settle)
            start += part.kept_bytes
        yield Piece.note(self._check.conclude)

    def _compare(
        self, part: CutPart, start: int, workspace: Workspace
    ) -> tuple[Bytes, FormatError | None]:
        """A part of the tensor, and how it differs from the source's."""
        expected = part.read(self._file, workspace, "stored")
        found = self._check.read(start, expected.size, workspace)
        what = difference(found, expected, start, self._cut.new_entry, self._source)
        return found, None if what is None else self._check.fault(what, _NOT_OF_SOURCE)

    def _settle(self, compared: tuple[Bytes, FormatError | None]) -> None:
        """Take note of a part; in order, so that of several faults the first is raised."""
        data, fault = compared
        if fault is not None:
            raise fault
        self._check.take(data)


@contextmanager
def shrunken_against(
    name: str, source: Source, report: ShrinkReport
) -> Iterator[ShrunkenComparison]:
    """Open a source, and find what the choices of a report keep of it.

    Args:
        name: What the user calls the source.
        source: Where it lies.
        report: The report of the smaller model, whose numbers agree with each other.

    Raises:
        CheckpointError: If the source cannot be shrunken.
        FormatError: If the report's choices are none of the source's structures.
    """
    asked = report["structures"]
    plan = ShrinkPlan.make(source, open_source(source), [kind for kind in KINDS if kind in asked])
    choices = [_choice(plan.structures[kind], asked[kind]) for kind in plan.structures]
    shrinkage = plan.with_choices(choices)
    narrowed = [kind for kind in WIDTHS if kind in asked]
    with source.files(plan.checkpoint.shards) as files:
        yield ShrunkenComparison(
            name=name,
            shrinkage=shrinkage,
            cuts={cut.name: cut for cut in shrinkage.all_cuts},
            readers=frozenset(entry.name for _, entry, _ in plan.readers(narrowed)),
            files=files,
        )


def _choice(structures: Structures, fields: StructureFields) -> Choice:
    """The choice that a report describes.

    Raises:
        FormatError: If it is not one of these structures.
    """
    kept = {holder: tuple(part["kept"]) for holder, part in fields["holders"].items()}
    highest = max((stays[-1] for stays in kept.values()), default=-1)
    if kept.keys() != set(structures.holders) or highest >= structures.number:
        raise FormatError(
            f"{SHRINK_REPORT_NAME}: what stays of the {structures.kind} is no choice of those of "
            f"the source: {SHRUNKEN_NOT_AS_WRITTEN}"
        )
    return Choice(kind=structures.kind, kept=kept)
