"""Checks a written folder by itself: checksums, structure, and the mask of every packed row.

report → config → other files → shards, tensor by tensor → index and headers → totals
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from emp_llm.checkpoint.checkpoint import Checkpoint, check_all_listed, open_checkpoint
from emp_llm.checkpoint.left_behind import CONFIG_NAME
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.deltas.base import stated_base
from emp_llm.errors import CheckpointError, FormatError
from emp_llm.options import NO_TARGETS, PruneOptions
from emp_llm.output.output_folder import STAGING_NAME
from emp_llm.report.fields import Report
from emp_llm.report.file import read_report
from emp_llm.report.file_names import NOT_AS_WRITTEN, REPORT_NAME
from emp_llm.report.folder_files import describe_json
from emp_llm.report.tensor_statistics import TensorStatistics
from emp_llm.report.totals import check_totals
from emp_llm.rule_fields import rule_options
from emp_llm.runtime.pipeline import Piece, thread_count
from emp_llm.runtime.progress import Progress, SharedProgress, Silent
from emp_llm.runtime.workers import Workers
from emp_llm.tensors.packed_config import (
    KNOWN_VERSIONS,
    is_delta,
    is_packed,
    quantization_config,
)
from emp_llm.tensors.planes import holds_planes
from emp_llm.verification.folder_checks import (
    changed_files,
    check_carried_weights,
    check_index,
    check_no_other_weights,
    check_written_alike,
    other_files,
)
from emp_llm.verification.tensor_checks import (
    BytesCheck,
    RowsCheck,
    TensorCheck,
    shard_checks,
)

__all__ = [
    "CheckedTensors",
    "Comparison",
    "WrittenFolder",
    "check_tensors",
    "check_whole",
    "check_written",
    "open_written",
]


@dataclass(frozen=True, kw_only=True)
class WrittenFolder:
    """A written folder whose configuration has been checked, and no tensor yet.

    Attributes:
        checkpoint: What its weight files hold.
        report: Its report; None where it has none, as `save_pretrained` leaves it.
        edited: Paths of files beside the weights that are not as they were written.
        other_files: Paths of files that neither the checkpoint nor the report accounts for.
        unfinished: Whether a run that did not end has left files in it.
    """

    checkpoint: Checkpoint
    report: Report | None
    edited: tuple[str, ...]
    other_files: tuple[str, ...]
    unfinished: bool

    def options(self) -> PruneOptions:
        """The rule that it was pruned by.

        Raises:
            FormatError: If this release does not know that rule.
        """
        if self.report is not None:
            return rule_options(REPORT_NAME, self.report["rule"])
        return rule_options(CONFIG_NAME, self.checkpoint.config["quantization_config"])


@dataclass
class CheckedTensors:
    """The tensors of a folder that were checked so far.

    Attributes:
        names: Their names.
        pruned: How many of them are pruned.
        packed: How many are packed, pruned or not.
        repaired: How many have other weights than the source gives.
        rows: Rows of the pruned tensors.
        kept: Weights that are kept in these.
        statistics: Of pruned tensors, where the source was pruned once more, by name.
    """

    names: set[str] = field(default_factory=set)
    pruned: int = 0
    packed: int = 0
    repaired: int = 0
    rows: int = 0
    kept: int = 0
    statistics: dict[str, TensorStatistics] = field(default_factory=dict)

    def add(self, check: TensorCheck) -> None:
        """Count a tensor whose check is done."""
        self.names.add(check.name)
        self.repaired += check.repaired
        self.packed += not isinstance(check, BytesCheck)
        if isinstance(check, RowsCheck):
            self.pruned += 1
            self.rows += check.rows
            self.kept += check.kept
            if check.statistics is not None:
                self.statistics[check.name] = check.statistics


class Comparison(Protocol):
    """Compares tensors of a written folder with those of another checkpoint."""

    @property
    def files(self) -> OpenFiles:
        """The other checkpoint's files."""

    def pieces(self, check: TensorCheck) -> Iterator[Piece]:
        """The work that checks a tensor and compares it."""


def check_written(folder: Path, *, progress: Progress | None = None) -> tuple[str, ...]:
    """Prove a folder whole as `verify` does, but allow edits of files that hold no weights.

    Returns:
        The paths of those that were edited or taken away.

    Raises:
        CheckpointError: As `verify` does.
        FormatError: As `verify` does, for all but those files.
    """
    shared = SharedProgress(progress or Silent())
    written = open_written(folder, shared)
    check_carried_weights(folder, written.edited)
    workers = Workers(threads=thread_count(None), progress=shared)
    workers.progress.begin("verifying", written.checkpoint.nbytes)
    check_whole(written, check_tensors(written, workers))
    return written.edited


def open_written(folder: Path, progress: SharedProgress) -> WrittenFolder:
    """Open a written folder and check its configuration, and that it has no stray weights.

    Raises:
        CheckpointError: If it is not a checkpoint, or nothing says what it must hold.
        FormatError: If its configuration is not the one that was written.
    """
    unfinished = (folder / STAGING_NAME).is_dir()
    if unfinished and not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{folder}: holds nothing but an unfinished run ({STAGING_NAME}); run the command "
            "that was to write it again"
        )
    if not folder.exists():
        raise CheckpointError(
            f"{folder}: there is no such folder; give one that `emp-llm prune` or "
            "`emp-llm unpack` wrote"
        )
    checkpoint = open_checkpoint(folder)
    check_all_listed(checkpoint.absent)
    report = read_report(folder)
    if report is not None:
        _check_reported_config(checkpoint, report)
    elif is_packed(checkpoint.config):
        _check_version(checkpoint)
    elif holds_planes(checkpoint.tensors):
        raise FormatError(
            f"{folder}: holds packed tensors, yet config.json has no quantization_config that says "
            "so: `emp-llm unpack` writes an ordinary checkpoint, or take config.json from where "
            "the model was pruned"
        )
    else:
        raise CheckpointError(
            f"{folder}: has no {REPORT_NAME} and is not packed, so nothing says what it must "
            "hold: give a folder that `emp-llm prune` wrote, or that `emp-llm unpack` made of one "
            "(where that is a delta, give the delta itself), or compare it with another one by "
            "`emp-llm diff`"
        )
    described = None if report is None else report["files"]
    check_no_other_weights(checkpoint, described)
    return WrittenFolder(
        checkpoint=checkpoint,
        report=report,
        edited=() if report is None else _edited(checkpoint, report, progress),
        other_files=other_files(checkpoint, described),
        unfinished=unfinished,
    )


def _edited(checkpoint: Checkpoint, report: Report, progress: SharedProgress) -> tuple[str, ...]:
    """Paths of files beside the weights that are not as they were written.

    A delta's config.json may name another folder of its base, which is known by its checksum.
    """
    edited, base = changed_files(checkpoint, report["files"], progress), report.get("base")
    config = checkpoint.config
    if base is None or CONFIG_NAME not in edited or not is_delta(config):
        return edited
    stated = stated_base(checkpoint.folder, config)
    if stated["revision"] is not None:
        return edited
    quantization = {**config["quantization_config"], "base": {**stated, **base}}
    written = describe_json({**config, "quantization_config": quantization})
    if written != report["files"].get(CONFIG_NAME):
        return edited
    return tuple(name for name in edited if name != CONFIG_NAME)


def _check_reported_config(checkpoint: Checkpoint, report: Report) -> None:
    """A packed folder must state the rule that it was pruned by; a dense one must state none."""
    found = checkpoint.config.get("quantization_config")
    packed = report["format"] == "packed"
    base = report.get("base")
    if base is not None and is_delta(checkpoint.config):  # a base may lie elsewhere by now
        stated = stated_base(checkpoint.folder, checkpoint.config)
        base = {**stated, "hash": base["hash"]}
    version = report["format_version"]
    expected = quantization_config(report["rule"], version, base) if packed else None
    if found != expected:
        raise FormatError(
            f"{checkpoint.folder}: quantization_config in config.json is {found}, by the report it "
            f"must be {expected}: {NOT_AS_WRITTEN}"
        )


def _check_version(checkpoint: Checkpoint) -> None:
    version = checkpoint.config["quantization_config"].get("format_version")
    if version not in KNOWN_VERSIONS:
        raise FormatError(
            f"{checkpoint.folder}: quantization_config in config.json states version {version} "
            f"of the format; this emp-llm reads versions {KNOWN_VERSIONS[0]} to "
            f"{KNOWN_VERSIONS[-1]}"
        )


def check_tensors(
    written: WrittenFolder,
    workers: Workers,
    comparison: Comparison | None = None,
) -> CheckedTensors:
    """Check every tensor of a folder.

    Args:
        written: The folder.
        workers: What reads and decodes.
        comparison: What compares tensors with those of another checkpoint; None to compare them
            with the report only.

    Raises:
        CheckpointError: If a file cannot be read.
        FormatError: At the first tensor that is not as it was written.
    """
    checked = CheckedTensors()
    tensors = None if written.report is None else written.report["tensors"]
    with OpenFiles() as files:

        def pieces() -> Iterator[Piece]:
            for shard in written.checkpoint.shards:
                for check in shard_checks(shard, files.file(shard), tensors):
                    yield from check.pieces() if comparison is None else comparison.pieces(check)
                    yield Piece.note(partial(checked.add, check))
                yield Piece.note(partial(files.done, shard))

        workers.run(pieces(), files.abandon if comparison is None else comparison.files.abandon)
    return checked


def check_whole(written: WrittenFolder, checked: CheckedTensors) -> None:
    """Check that no tensor is missing, and index, headers and totals against the tensors.

    Args:
        written: The folder.
        checked: Its tensors, all of them checked.

    Raises:
        CheckpointError: If a file cannot be read.
        FormatError: If something is missing or wrong.
    """
    checkpoint, report = written.checkpoint, written.report
    if report is None:
        # of a small model that is not pruned, no tensor may be large enough to be packed
        lossless = checkpoint.config["quantization_config"].get("targets") == NO_TARGETS
        if not checked.packed and not lossless:
            raise FormatError(
                f"{checkpoint.folder}: is packed by config.json, but no tensor of it is; "
                "`emp-llm unpack` writes the ordinary checkpoint that it is"
            )
        check_index(checkpoint, sizes=False)
        return
    missing = report["tensors"].keys() - checked.names
    if missing:
        raise FormatError(
            f"tensor {min(missing)!r} is in {REPORT_NAME} and in no shard ({len(missing)} missing)"
        )
    check_totals(report)
    check_index(checkpoint, sizes=True)
    check_written_alike(checkpoint, report["files"])
