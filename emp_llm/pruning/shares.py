"""Who works on what: the shards of each rank, and the threads and devices of this one."""

from collections.abc import Callable, Iterable

from emp_llm.checkpoint.shard import Shard
from emp_llm.pruning.plan import PruningPlan
from emp_llm.runtime.devices import Devices, worthwhile_devices
from emp_llm.runtime.gpu_gain import Work
from emp_llm.runtime.pipeline import thread_count
from emp_llm.runtime.progress import SharedProgress
from emp_llm.runtime.team import Team
from emp_llm.runtime.workers import Workers

__all__ = ["find_workers", "own_share"]


def own_share(shards: Iterable[Shard], nbytes: Callable[[Shard], int], team: Team) -> list[Shard]:
    """This rank's share of some shards, in their order; each shard is one rank's.

    The largest is given out first, each to the rank that has the fewest bytes by then.
    """
    shards = list(shards)
    loads, shares = [0] * team.size, [set[str]() for _ in range(team.size)]
    for shard in sorted(shards, key=lambda shard: (-nbytes(shard), shard.name)):
        rank = loads.index(min(loads))
        loads[rank] += nbytes(shard)
        shares[rank].add(shard.name)
    return [shard for shard in shards if shard.name in shares[team.rank]]


def find_workers(
    plan: PruningPlan,
    devices: Devices | None,
    threads: int | None,
    progress: SharedProgress,
    team: Team,
) -> Workers:
    """Find what works on a plan.

    Args:
        plan: The plan.
        devices: The devices that the user asked for; None for GPUs where they make the run faster.
        threads: As for `thread_count`.
        progress: Reports the work of all ranks.
        team: The ranks, all of which call this.

    Raises:
        OptionError: If `threads` is less than 1.
    """
    processes = team.local_size
    if devices is None:
        own = own_share(plan.checkpoint.shards, lambda shard: shard.header.file_size, team)
        cores = min(thread_count(threads, processes), thread_count(None, processes))
        work = Work(
            kernel="pack" if plan.options.output_format == "packed" else "prune",
            # what comes over a network is not worth a GPU
            nbytes=0 if plan.source.to_come else plan.bytes_to_prune(own),
            cores=cores,
            processes=processes,
        )
        devices = worthwhile_devices(work, team)
    team.tell_progress(progress.advance)
    return Workers(
        threads=thread_count(threads, processes, len(devices.gpus)),
        progress=progress,
        devices=devices,
        team=team,
    )
