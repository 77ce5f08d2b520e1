"""Pack: a checkpoint in, the same weights out in fewer bytes. Nothing is pruned."""

import os

from emp_llm.entrypoints.prune import prune
from emp_llm.options import NO_TARGETS, PruneOptions
from emp_llm.report.fields import Report
from emp_llm.runtime.progress import Progress

__all__ = ["pack"]


def pack(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    discard_source: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    distributed: bool = False,
) -> Report:
    """Pack a checkpoint without pruning it: smaller, and every weight keeps every bit.

    This is `emp_llm.prune` with ``targets="none"``. It streams and resumes in the same way, and the
    result loads through ``from_pretrained``. `emp_llm.unpack` gives the source's tensors back;
    `emp_llm.verify` with ``against`` checks that they are the same.

    >>> from emp_llm import pack, verify
    >>> report = pack("demo/model", "lossless")
    >>> report["totals"]["model"]["bytes_ratio"] < 0.7
    True
    >>> checked = verify("lossless", against="demo/model")
    >>> checked["tensors"], checked["pruned_tensors"]
    (38, 0)

    Args:
        model: As for `emp_llm.prune`.
        out: As for `emp_llm.prune`.
        revision: As for `emp_llm.prune`.
        token: As for `emp_llm.prune`.
        discard_source: As for `emp_llm.prune`.
        overwrite: As for `emp_llm.prune`.
        threads: As for `emp_llm.prune`.
        progress: As for `emp_llm.prune`.
        distributed: As for `emp_llm.prune`.

    Returns:
        The report, as in the result's ``emp_report.json``.

    Raises:
        CheckpointError: If the source is not a checkpoint that can be packed.
        HubError: If it cannot be downloaded.
        OptionError: If `discard_source` is asked for with a local folder.
        OutputError: If `out` cannot be written, or holds an unfinished run that differs.
        RankError: If another of the processes failed.
    """
    return prune(
        model,
        out,
        PruneOptions(targets=NO_TARGETS),
        revision=revision,
        token=token,
        discard_source=discard_source,
        overwrite=overwrite,
        device="cpu",
        threads=threads,
        progress=progress,
        distributed=distributed,
    )
