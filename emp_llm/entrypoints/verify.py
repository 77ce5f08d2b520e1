"""Verify: is a folder as it was written, and is it what pruning its source gives?

folder → configuration → tensors, compared with the source if it is given → the whole
"""

import os
from pathlib import Path
from typing import TypedDict

from emp_llm.errors import OptionError
from emp_llm.hub.source import find_source
from emp_llm.report.file_names import SHRINK_REPORT_NAME
from emp_llm.runtime.pipeline import thread_count
from emp_llm.runtime.progress import Progress, SharedProgress, Silent
from emp_llm.runtime.workers import Workers
from emp_llm.verification.folder_checks import file_fault
from emp_llm.verification.shrunken_comparison import shrunken_against
from emp_llm.verification.shrunken_folder import (
    ShrunkenFolder,
    check_shrunken_tensors,
    is_shrunken,
    open_shrunken,
)
from emp_llm.verification.source_comparison import SourceComparison, compared_with
from emp_llm.verification.written_folder import (
    CheckedTensors,
    WrittenFolder,
    check_tensors,
    check_whole,
    open_written,
)

__all__ = ["Verified", "verify"]


class Verified(TypedDict):
    """What `verify` checked.

    Attributes:
        tensors: How many tensors.
        pruned_tensors: How many of them are pruned.
        repaired_tensors: How many have other weights than the source gives, by report or config.
        rows: Rows of the pruned tensors.
        kept: Weights that are kept in these rows.
        bytes: Bytes of all tensors' data.
        hashes: Whether there were checksums to compare with.
        against: The source as it was given; None without one.
        masks_derived: Whether every mask was computed again; None without a source.
        other_files: Paths of files that were not checked, since nothing says what they must hold.
        unfinished_run: Whether a run that did not end has left files in the folder.
        structures: Of a folder that `shrink` wrote, how many structures of each kind stay in each
            layer, and of how many; None of any other.
    """

    tensors: int
    pruned_tensors: int
    repaired_tensors: int
    rows: int
    kept: int
    bytes: int
    hashes: bool
    against: str | None
    masks_derived: bool | None
    other_files: list[str]
    unfinished_run: bool
    structures: dict[str, tuple[int, int]] | None


def verify(
    folder: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Check that a folder is as `prune`, `unpack` or `shrink` wrote it.

    It checks the checksum of every tensor, header and file; the structure of every packed row
    (mask, counts, escapes, finite values) and the number of weights that it keeps; and index,
    shards, configuration and report against each other. The model card and the results of an
    evaluation are not checked, since they may be written again.

    A packed folder without a report, as `save_pretrained` writes it, has no checksums: its
    structure is checked, but changed values are not found. A folder that has no report and is not
    packed is refused.

    With `against`, the rule is applied to the source again: which tensors are pruned, what each
    group keeps, and every number of the report. The folder must be, bit for bit, what pruning the
    source gives: kept weights and all other tensors as in the source, +0.0 for pruned weights.
    Configuration and all files beside the weights must be the source's.

    A delta is checked without its base. With `against`, the fine-tuned model, the base is read too,
    from where the delta's ``config.json`` says: its checksum, the differences, and that nothing but
    what the base has is left out.

    Where scores came from data, or counts from an allocation, masks are not computed again. Then
    every weight must be the source's or +0.0, and with granularity `row` and magnitudes counted
    each row must keep as many weights as the rule gives: by its target's β in the report where
    targets have different ones, or the same share where they keep that. Weights and biases that
    the report calls repaired may have any value.

    Of a folder that `shrink` wrote, the checksum of every tensor, header and file is checked, and
    that the report's numbers are those of config.json and the tensors. With `against`, each tensor
    must be, bit for bit, what the choices of the report keep of the source's one, and config.json
    and all numbers what they make of the source's. Matrices that the report calls repaired may have
    any value, if they read neurons or key-value heads that went and its options repair these.

    >>> from emp_llm import prune, verify
    >>> report = prune("demo/model", "sparse")
    >>> checked = verify("sparse", against="demo/model")
    >>> checked["pruned_tensors"], checked["tensors"], checked["masks_derived"]
    (12, 38, True)
    >>> checked["kept"] == report["totals"]["targets"]["kept"]
    True
    >>> with open("sparse/model.safetensors", "r+b") as file:
    ...     _ = file.seek(-1, 2), file.write(b"?")
    >>> verify("sparse")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    emp_llm.errors.FormatError: model.safetensors: tensor ... has the hash ...

    Args:
        folder: The folder.
        against: The source, a folder or a model of the Hugging Face Hub.
        revision: Branch, tag or commit of a source on the Hub.
        token: Token for the Hub; by default the one that is logged in.
        threads: Threads that read and decode; all cores by default.
        progress: Reports how the work goes on.

    Returns:
        What was checked.

    Raises:
        CheckpointError: If the folder is not a checkpoint, or nothing says what it must hold; or if
            the source cannot be pruned.
        HubError: If the source cannot be fetched.
        FormatError: At the first thing that is not as it was written, or not as the source has it.
        OptionError: If a revision is given without a source on the Hub.
    """
    if against is None and revision is not None:
        raise OptionError(
            f"revision is {revision!r}, which selects a version of the source: give against as well"
        )
    progress = SharedProgress(progress or Silent())
    if is_shrunken(Path(folder)):
        workers = Workers(threads=thread_count(threads), progress=progress)
        return _verify_shrunken(Path(folder), against, revision, token, workers)
    written = open_written(Path(folder), progress)
    if written.edited:
        raise file_fault(written.checkpoint.folder, written.edited[0])
    workers = Workers(threads=thread_count(threads), progress=progress)
    if against is None:
        progress.begin("verifying", written.checkpoint.nbytes)
        checked = check_tensors(written, workers)
        check_whole(written, checked)
        return _found(written, checked)
    source = find_source(against, revision=revision, token=token, progress=progress)
    with compared_with(os.fspath(against), source, written, workers) as comparison:
        progress.begin("comparing", comparison.checkpoint.nbytes)
        checked = check_tensors(written, workers, comparison)
        check_whole(written, checked)
        comparison.check_complete(written, checked, progress)
        return _found(written, checked, comparison)


def _found(
    written: WrittenFolder, checked: CheckedTensors, comparison: SourceComparison | None = None
) -> Verified:
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
        "structures": None,
    }


def _verify_shrunken(
    folder: Path,
    against: str | os.PathLike[str] | None,
    revision: str | None,
    token: str | bool | None,
    workers: Workers,
) -> Verified:
    progress = workers.progress
    written = open_shrunken(folder, progress)
    if written.edited:
        raise file_fault(folder, written.edited[0], SHRINK_REPORT_NAME)
    written.check_report()
    if against is None:
        progress.begin("verifying", written.checkpoint.nbytes)
        return _found_shrunken(written, check_shrunken_tensors(written, workers))
    name = os.fspath(against)
    source = find_source(name, revision=revision, token=token, progress=progress)
    with shrunken_against(name, source, written.report) as comparison:
        progress.begin("comparing", written.checkpoint.nbytes)
        repaired = check_shrunken_tensors(written, workers, comparison.pieces)
        comparison.check_complete(written, progress)
    return _found_shrunken(written, repaired, name)


def _found_shrunken(written: ShrunkenFolder, repaired: int, against: str | None = None) -> Verified:
    structures = written.report["structures"]
    return {
        "tensors": len(written.checkpoint.tensors),
        "pruned_tensors": 0,
        "repaired_tensors": repaired,
        "rows": 0,
        "kept": 0,
        "bytes": written.checkpoint.nbytes,
        "hashes": True,
        "against": against,
        "masks_derived": None,
        "other_files": list(written.other_files),
        "unfinished_run": written.unfinished,
        "structures": {
            kind: (fields["kept"], fields["number"]) for kind, fields in structures.items()
        },
    }
