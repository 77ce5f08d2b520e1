"""`verify`: proves a folder whole, and against its source."""

import os
from pathlib import Path
from typing import Any

from emp_llm.errors import OptionError
from emp_llm.hub.source import find_source
from emp_llm.runtime.pipeline import thread_count
from emp_llm.runtime.progress import Progress, SharedProgress, Silent
from emp_llm.runtime.workers import Workers
from emp_llm.verification.folder_checks import file_fault
from emp_llm.verification.source_comparison import SourceComparison, compared_with
from emp_llm.verification.written_folder import (
    CheckedTensors,
    WrittenFolder,
    check_tensors,
    check_whole,
    open_written,
)

__all__ = ["verify"]


def verify(
    folder: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prove a folder that `prune` or `unpack` wrote whole.

    Checked are the checksum of every tensor, header and file, the structure of every packed row
    (mask, counts, escapes, finite values) and the number of weights it keeps, and index, shards,
    configuration and report against each other. The model card and the figures of an evaluation,
    which are written anew, are not.

    A packed folder without a report, as `save_pretrained` writes it, has no checksums to compare
    with: its structure is proved, values that have changed are not found. One that is neither is
    refused.

    With `against`, every decision of the rule is made once more on the source: which tensors are
    pruned, what each group keeps, and every figure of the report. The folder must be, bit for bit,
    what pruning the source leaves: kept weights and all other tensors as they are there, +0.0 in
    the place of the pruned ones; and configuration and small files must be the source's.

    Where scores came from data no mask can be decided again. Then every weight must be the source's
    or +0.0, and with granularity `row` rows must keep as many as their magnitudes say if these were
    counted. Weights and biases that the report tells to be repaired may be any.

    Args:
        folder: The folder.
        against: The source, a folder or a model of the Hugging Face Hub.
        revision: Branch, tag or commit of a source on the Hub.
        token: Token for the Hub; by default the one that is logged in.
        threads: Threads that read and decode; all cores by default.
        progress: Told how the work goes on.

    Returns:
        What was checked: ``tensors``, ``pruned_tensors``, ``repaired_tensors``, as report or
        config tell, ``rows``, ``kept`` and ``bytes``;
        ``hashes``, whether there were checksums to compare with; ``against``, the source or None;
        ``masks_derived``, whether every mask was decided once more, None without a source;
        ``other_files``, paths of files that nothing tells of; and ``unfinished_run``, whether a
        run that did not end has left files in the folder.

    Raises:
        CheckpointError: If it is no checkpoint, or nothing tells what it must hold; or if the
            source is none that can be pruned; HubError if it cannot be fetched.
        FormatError: At the first thing that is not as it was written, or not as the source has it.
        OptionError: If a revision is given for a local source, or for none.
    """
    if against is None and revision is not None:
        raise OptionError(
            f"revision is {revision!r}, which is that of the source: give against as well"
        )
    written = open_written(Path(folder))
    if written.edited:
        raise file_fault(written.checkpoint.folder, written.edited[0])
    progress = SharedProgress(progress or Silent())
    workers = Workers(threads=thread_count(threads), progress=progress)
    if against is None:
        progress.begin("verifying", written.checkpoint.nbytes)
        checked = check_tensors(written, workers)
        check_whole(written, checked)
        return _found(written, checked)
    source = find_source(against, revision=revision, token=token, progress=progress)
    with compared_with(os.fspath(against), source, written.options(), workers) as comparison:
        progress.begin("comparing", comparison.checkpoint.nbytes)
        checked = check_tensors(written, workers, comparison)
        check_whole(written, checked)
        comparison.check_complete(written, checked)
        return _found(written, checked, comparison)


def _found(
    written: WrittenFolder, checked: CheckedTensors, comparison: SourceComparison | None = None
) -> dict[str, Any]:
    return {
        "tensors": len(checked.names),
        "pruned_tensors": checked.pruned,
        "repaired_tensors": checked.repaired,
        "rows": checked.rows,
        "kept": checked.kept,
        "bytes": written.checkpoint.nbytes,
        "hashes": written.report is not None,
        "against": None if comparison is None else comparison.name,
        "masks_derived": None if comparison is None else comparison.selection is not None,
        "other_files": list(written.other_files),
        "unfinished_run": written.unfinished,
    }
