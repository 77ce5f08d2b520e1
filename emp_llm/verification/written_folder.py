"""Is a written folder whole? Hashes, structure, and the mask of every packed row.

report → config → small files → shards, tensor by tensor → index and headers → totals

With the source at hand, everything that pruning decides is decided once more and compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from emp_llm.checkpoint.checkpoint import open_checkpoint
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.small_files import CONFIG_NAME
from emp_llm.errors import CheckpointError, FormatError
from emp_llm.options import PruneOptions
from emp_llm.output.output_folder import STAGING_NAME
from emp_llm.report.file import read_report
from emp_llm.report.file_names import REPORT_NAME
from emp_llm.report.totals import check_totals
from emp_llm.rule_fields import rule_options
from emp_llm.runtime.pipeline import Piece, run_pieces, thread_count
from emp_llm.runtime.progress import Progress, SharedProgress, Silent
from emp_llm.tensors.packed_config import FORMAT_VERSION, is_packed, quantization_config
from emp_llm.verification.folder_checks import (
    changed_files,
    check_index,
    check_no_other_weights,
    check_written_alike,
    other_files,
)
from emp_llm.verification.source_comparison import Original
from emp_llm.verification.tensor_checks import RowsCheck, TensorCheck, shard_checks

__all__ = ["check_written"]


def check_written(folder: Path, *, progress: Progress | None = None) -> tuple[str, ...]:
    """`verify`, but for configuration and small files that were edited since they were written.

    Returns:
        The paths of those that were edited or taken away.

    Raises:
        CheckpointError: As `verify` does.
        FormatError: As `verify` does, for all but those.
    """
    written = _Written(folder)
    written.check(thread_count(None), SharedProgress(progress or Silent()))
    return written.edited


class _Written:
    """A written folder: its checkpoint, and its report if it has one.

    Attributes:
        folder: The folder.
        edited: Its configuration and small files that are not as they were written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._unfinished = (folder / STAGING_NAME).is_dir()
        if self._unfinished and not (folder / CONFIG_NAME).is_file():
            raise CheckpointError(
                f"{folder}: holds nothing but an unfinished run ({STAGING_NAME}); run the command "
                "that was to write it again"
            )
        if not folder.exists():
            raise CheckpointError(
                f"{folder}: there is no such folder; give one that `emp-llm prune` or "
                "`emp-llm unpack` wrote"
            )
        self._checkpoint = open_checkpoint(folder)
        self._report = read_report(folder)
        if self._report is None and not is_packed(self._checkpoint.config):
            raise CheckpointError(
                f"{folder}: has no {REPORT_NAME} and is not packed, so nothing tells what it must "
                "hold; give a folder that `emp-llm prune` or `emp-llm unpack` wrote, or compare it "
                "with another one by `emp-llm diff`"
            )
        self._check_config()
        check_no_other_weights(self._checkpoint)
        described = None if self._report is None else self._report["files"]
        self.edited = changed_files(self._checkpoint, described) if described else ()
        self._others = other_files(self._checkpoint, described)

    def options(self) -> PruneOptions:
        """The rule that it was pruned by."""
        if self._report is not None:
            return rule_options(REPORT_NAME, self._report["rule"])
        return rule_options(CONFIG_NAME, self._checkpoint.config["quantization_config"])

    def check(
        self,
        threads: int,
        progress: SharedProgress,
        original: Original | None = None,
        source_files: OpenFiles | None = None,
    ) -> dict[str, Any]:
        """Check all but the small files; what `verify` returns.

        Args:
            threads: Threads that work.
            progress: Told how the work goes on.
            original: The source to compare with.
            source_files: Its files.
        """
        found = _Found()
        tensors = None if self._report is None else self._report["tensors"]
        with OpenFiles() as files:

            def pieces() -> Iterator[Piece]:
                for shard in self._checkpoint.shards:
                    for check in shard_checks(shard, files.file(shard), tensors):
                        if original is None or source_files is None:
                            yield from check.pieces()
                        else:
                            yield from original.compare(check, source_files)
                        yield Piece.note(partial(found.add, check))
                    yield Piece.note(partial(files.done, shard))

            if original is None or source_files is None:
                progress.begin("verifying", self._checkpoint.nbytes)
                run_pieces(pieces(), threads=threads, progress=progress.advance)
            else:
                original.select(source_files)
                progress.begin("comparing", original.checkpoint.nbytes)
                abandon = source_files.abandon
                run_pieces(pieces(), threads=threads, progress=progress.advance, abandon=abandon)
        self._check_complete(found)
        if original is not None:
            original.check_complete(self._checkpoint, found.names, self._report)
        return {
            "tensors": len(found.names),
            "pruned_tensors": found.pruned,
            "repaired_tensors": found.repaired if original is None else len(original.repaired),
            "rows": found.rows,
            "kept": found.kept,
            "bytes": self._checkpoint.nbytes,
            "hashes": self._report is not None,
            "against": None if original is None else original.name,
            "masks_derived": None if original is None else original.masks_derived,
            "other_files": list(self._others),
            "unfinished_run": self._unfinished,
        }

    def _check_config(self) -> None:
        """A packed folder must say so, and by the rule it was pruned by; a dense one must not."""
        found = self._checkpoint.config.get("quantization_config")
        if self._report is None:
            version = None if found is None else found.get("format_version")
            if version != FORMAT_VERSION:
                raise FormatError(
                    f"{self.folder}: quantization_config in config.json tells of version {version} "
                    f"of the format; this emp-llm reads version {FORMAT_VERSION}"
                )
            return
        is_packed = self._report["format"] == "packed"
        expected = quantization_config(self._report["rule"]) if is_packed else None
        if found != expected:
            raise FormatError(
                f"{self.folder}: quantization_config in config.json is {found}, by the report it "
                f"must be {expected}: one of the two files is not the one that was written"
            )

    def _check_complete(self, found: "_Found") -> None:
        if self._report is None:
            if not found.pruned:
                raise FormatError(
                    f"{self.folder}: is packed by config.json, but no tensor of it is"
                )
            check_index(self._checkpoint, sizes=False)
            return
        missing = self._report["tensors"].keys() - found.names
        if missing:
            raise FormatError(
                f"tensor {min(missing)!r} is in {REPORT_NAME} and in no shard "
                f"({len(missing)} missing)"
            )
        check_totals(self._report)
        check_index(self._checkpoint, sizes=True)
        check_written_alike(self._checkpoint, self._report["files"])


@dataclass
class _Found:
    """What was checked so far."""

    names: set[str] = field(default_factory=set)
    pruned: int = 0
    repaired: int = 0
    rows: int = 0
    kept: int = 0

    def add(self, check: TensorCheck) -> None:
        """Count a tensor."""
        self.names.add(check.name)
        self.pruned += isinstance(check, RowsCheck)
        self.repaired += bool(check.fields and check.fields.get("repaired"))
        self.rows += check.rows
        self.kept += check.kept
