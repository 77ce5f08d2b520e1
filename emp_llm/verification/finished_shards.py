"""Finds the finished shards of an unfinished run that are still as it wrote them."""

from functools import partial
from itertools import chain

from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.safetensors_header import read_header
from emp_llm.checkpoint.shard import Shard
from emp_llm.errors import CheckpointError, FormatError
from emp_llm.output.output_folder import OutputFolder
from emp_llm.pruning.plan import PruningPlan
from emp_llm.pruning.plan_report import tensor_report
from emp_llm.pruning.shard_plan import output_name
from emp_llm.pruning.stages import own_share
from emp_llm.runtime.workers import Workers
from emp_llm.verification.tensor_checks import shard_checks

__all__ = ["find_finished"]


def find_finished(plan: PruningPlan, workers: Workers, folder: OutputFolder) -> set[str]:
    """Check the files that an earlier run has finished, and remove those that are damaged.

    Args:
        plan: The plan that both runs have.
        workers: What reads the files; each rank checks its share of them.
        folder: The folder that is written.

    Returns:
        The names of the files that are as they were written.
    """
    journal, team = folder.journal, workers.team
    sizes = team.share(
        lambda: {name: (folder.staging / name).stat().st_size for name in journal.finished()}
    )
    name = partial(output_name, plan.checkpoint)
    shards = [shard for shard in plan.checkpoint.shards if name(shard) in sizes]
    if not shards:
        return set()
    workers.progress.begin("checking", sum(sizes.values()))
    damaged = []
    for shard in own_share(shards, lambda shard: sizes[name(shard)], team):
        if not _is_sound(plan, workers, folder, shard):
            damaged.append(name(shard))
            journal.forget(name(shard))
    return {name(shard) for shard in shards}.difference(*team.gather(damaged))


def _is_sound(plan: PruningPlan, workers: Workers, folder: OutputFolder, shard: Shard) -> bool:
    """Whether the file of a shard is as an earlier run wrote it."""
    file_name = output_name(plan.checkpoint, shard)
    path = folder.staging / file_name
    outcomes = folder.journal.outcomes(file_name)
    if outcomes is None or outcomes.keys() != {e.name for e in shard.header.tensors}:
        return False
    fields = {
        name: tensor_report(plan, name, outcome).to_dict() for name, outcome in outcomes.items()
    }
    try:
        written = Shard(file_name, path, read_header(path))
        with OpenFiles() as files:
            checks = shard_checks(written, files.file(written), fields)
            pieces = chain.from_iterable(check.pieces() for check in checks)
            workers.run(pieces, files.abandon)
    except (CheckpointError, FormatError):
        return False
    return True
