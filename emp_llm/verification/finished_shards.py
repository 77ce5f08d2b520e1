"""Finds the finished shards of an unfinished run that are still as it wrote them."""

from collections.abc import Callable, Mapping
from itertools import chain

from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.safetensors_header import read_header
from emp_llm.checkpoint.shard import Shard
from emp_llm.errors import CheckpointError, FormatError
from emp_llm.output.output_folder import OutputFolder
from emp_llm.pruning.stages import own_share
from emp_llm.report.fields import TensorFields
from emp_llm.report.report import Outcome
from emp_llm.runtime.workers import Workers
from emp_llm.verification.tensor_checks import shard_checks

__all__ = ["Describe", "find_finished"]

Describe = Callable[[Shard, Mapping[str, Outcome]], Mapping[str, TensorFields] | None]
"""What a report says of the tensors that a shard of the source gives, by name, if this became of
them; None if it gives other tensors."""


def find_finished(
    shards: Mapping[str, Shard], describe: Describe, workers: Workers, folder: OutputFolder
) -> set[str]:
    """Check the files that an earlier run has finished, and remove those that are damaged.

    Args:
        shards: The shards of the source, by the names of the files that they give.
        describe: Says what must be in such a file.
        workers: What reads the files; each rank checks its share of them.
        folder: The folder that is written.

    Returns:
        The names of the files that are as they were written.
    """
    journal, team = folder.journal, workers.team
    sizes = team.share(
        lambda: {name: (folder.staging / name).stat().st_size for name in journal.finished()}
    )
    names = {shard.name: name for name, shard in shards.items() if name in sizes}
    if not names:
        return set()
    workers.progress.begin("checking", sum(sizes.values()))
    damaged = []
    there = [shard for shard in shards.values() if shard.name in names]
    for shard in own_share(there, lambda shard: sizes[names[shard.name]], team):
        name = names[shard.name]
        if not _is_sound(name, shard, describe, workers, folder):
            damaged.append(name)
            journal.forget(name)
    return set(names.values()).difference(*team.gather(damaged))


def _is_sound(
    name: str, shard: Shard, describe: Describe, workers: Workers, folder: OutputFolder
) -> bool:
    """Whether the file of a shard is as an earlier run wrote it."""
    path = folder.staging / name
    outcomes = folder.journal.outcomes(name)
    fields = None if outcomes is None else describe(shard, outcomes)
    if fields is None:
        return False
    try:
        written = Shard(name, path, read_header(path))
        with OpenFiles() as files:
            checks = shard_checks(written, files.file(written), fields)
            pieces = chain.from_iterable(check.pieces() for check in checks)
            workers.run(pieces, files.abandon)
    except (CheckpointError, FormatError):
        return False
    return True
