"""Checks a folder that `shrink` wrote by itself: checksums of tensors, headers and files.

report → other files → shards, tensor by tensor → index and headers
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from emp_llm.checkpoint.checkpoint import Checkpoint, check_all_listed, open_checkpoint
from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.left_behind import CONFIG_NAME
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.errors import FormatError
from emp_llm.output.output_folder import STAGING_NAME
from emp_llm.report.file_names import (
    REPORT_NAME,
    SHRINK_FIGURE_NAME,
    SHRINK_REPORT_NAME,
    SHRUNKEN_NOT_AS_WRITTEN,
)
from emp_llm.report.shrink_report import ShrinkReport, as_other_tensor, read_shrink_report
from emp_llm.runtime.pipeline import Piece, thread_count
from emp_llm.runtime.progress import Progress, SharedProgress, Silent
from emp_llm.runtime.workers import Workers
from emp_llm.verification.folder_checks import (
    changed_files,
    check_carried_weights,
    check_index,
    check_no_other_weights,
    check_written_alike,
    other_files,
)
from emp_llm.verification.shrunken_report import (
    check_choices,
    check_config_changes,
    check_sizes,
    repairs,
)
from emp_llm.verification.tensor_checks import BytesCheck

__all__ = [
    "ShrunkenFolder",
    "check_shrunken",
    "check_shrunken_tensors",
    "is_shrunken",
    "open_shrunken",
]

_MATRIX = 2
"""Dimensions of what reads neurons or heads."""

Pieces = Callable[[BytesCheck], Iterator[Piece]]
"""The work that checks one tensor."""


def is_shrunken(folder: Path) -> bool:
    """Whether a folder is as `shrink` wrote it, by its reports; not if it was pruned afterwards."""
    return (folder / SHRINK_REPORT_NAME).is_file() and not (folder / REPORT_NAME).is_file()


@dataclass(frozen=True, kw_only=True)
class ShrunkenFolder:
    """A smaller model, no tensor of which has been checked yet.

    Attributes:
        checkpoint: What its weight files hold.
        report: Its report.
        edited: Paths of files beside the weights that are not as they were written.
        other_files: Paths of files that neither the checkpoint nor the report accounts for.
        unfinished: Whether a run that did not end has left files in it.
    """

    checkpoint: Checkpoint
    report: ShrinkReport
    edited: tuple[str, ...]
    other_files: tuple[str, ...]
    unfinished: bool

    def check_report(self) -> None:
        """Check the numbers in its report but for sizes; against config.json unless it was edited.

        Raises:
            FormatError: If they do not agree with each other or with it.
        """
        check_choices(self.report)
        if CONFIG_NAME not in self.edited:
            check_config_changes(self.checkpoint, self.report)


def open_shrunken(folder: Path, progress: SharedProgress) -> ShrunkenFolder:
    """Open a smaller model, and check that it has no stray weights.

    Args:
        folder: A folder that `is_shrunken` is true of.
        progress: Shows how far the work on files beside the weights is.

    Raises:
        CheckpointError: If it is not a checkpoint.
        FormatError: If its report is not one that emp-llm wrote, or it has stray weights.
    """
    checkpoint = open_checkpoint(folder)
    check_all_listed(checkpoint.absent)
    report = cast("ShrinkReport", read_shrink_report(folder))
    check_no_other_weights(checkpoint, report["files"])
    own = (SHRINK_REPORT_NAME, SHRINK_FIGURE_NAME)
    others = other_files(checkpoint, report["files"])
    return ShrunkenFolder(
        checkpoint=checkpoint,
        report=report,
        edited=changed_files(checkpoint, report["files"], progress),
        other_files=tuple(name for name in others if name not in own),
        unfinished=(folder / STAGING_NAME).is_dir(),
    )


def check_shrunken_tensors(
    folder: ShrunkenFolder, workers: Workers, pieces: Pieces = BytesCheck.pieces
) -> int:
    """Check every tensor of a smaller model, then their sizes in the report, index and headers.

    Args:
        folder: The folder.
        workers: What reads it.
        pieces: The work that checks a tensor; by default its checksum is compared.

    Returns:
        How many tensors are repaired, by the report.

    Raises:
        CheckpointError: If a file cannot be read.
        FormatError: At the first tensor that is not as it was written.
    """
    checkpoint, report = folder.checkpoint, folder.report
    if absent := report["tensors"].keys() - checkpoint.tensors.keys():
        raise FormatError(
            f"tensor {min(absent)!r} is in {SHRINK_REPORT_NAME} and in no shard ({len(absent)} "
            "missing)"
        )
    repaired = 0
    with OpenFiles() as files:

        def all_pieces() -> Iterator[Piece]:
            nonlocal repaired
            for shard in checkpoint.shards:
                for entry in shard.header.tensors:
                    check = _check(folder.report, shard, entry, files.file(shard))
                    repaired += check.repaired
                    yield from pieces(check)
                yield Piece.note(partial(files.done, shard))

        workers.run(all_pieces(), files.abandon)
    check_sizes(checkpoint, report)
    check_index(checkpoint, sizes=True)
    check_written_alike(checkpoint, report["files"], SHRINK_REPORT_NAME, SHRUNKEN_NOT_AS_WRITTEN)
    return repaired


class _Check(BytesCheck):
    """The check of one tensor of a smaller model."""

    def fault(self, what: str, remedy: str = SHRUNKEN_NOT_AS_WRITTEN) -> FormatError:
        """The error that says what is wrong with the tensor."""
        return super().fault(what, remedy)


def _check(report: ShrinkReport, shard: Shard, entry: TensorEntry, file: SourceFile) -> BytesCheck:
    fields = report["tensors"].get(entry.name)
    if fields is None:
        raise FormatError(
            f"{shard.name}: tensor {entry.name!r} is not in {SHRINK_REPORT_NAME}: "
            f"{SHRUNKEN_NOT_AS_WRITTEN}"
        )
    check = _Check(shard.name, file, entry, as_other_tensor(fields))
    if check.repaired and not (repairs(report) and len(entry.shape) == _MATRIX):
        raise check.fault("is repaired by the report, and by its options it cannot have been")
    check.expect(dtype=entry.dtype, shape=list(entry.shape))
    return check


def check_shrunken(folder: Path, *, progress: Progress | None = None) -> tuple[str, ...]:
    """Prove a smaller model whole, but allow edits of files that hold no weights.

    Returns:
        The paths of those that were edited or taken away.

    Raises:
        CheckpointError: As `open_shrunken` and `check_shrunken_tensors` do.
        FormatError: As they do, for all but those files.
    """
    shared = SharedProgress(progress or Silent())
    opened = open_shrunken(folder, shared)
    check_carried_weights(folder, opened.edited)
    opened.check_report()
    workers = Workers(threads=thread_count(None), progress=shared)
    workers.progress.begin("verifying", opened.checkpoint.nbytes)
    check_shrunken_tensors(opened, workers)
    return opened.edited
