"""Which processes take part in a run, from what torchrun, ``accelerate launch`` or srun set."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Meeting", "meeting_of"]


@dataclass(frozen=True)
class Meeting:
    """Where the processes of a run meet.

    Attributes:
        rank: This process's number, from 0.
        size: How many there are.
        local_size: How many of them are on this machine, as far as is known.
        url: Where torch's store is; None where torch reads it from the environment.
    """

    rank: int
    size: int
    local_size: int
    url: str | None


def meeting_of(environment: Mapping[str, str]) -> Meeting | None:
    """Find out from the environment where the processes of this run meet.

    torchrun and ``accelerate launch`` set ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and
    ``MASTER_PORT``. srun sets ``SLURM_*`` for each step of a job; its ranks meet on the first
    machine of the step unless ``MASTER_ADDR`` and ``MASTER_PORT`` name another place.

    Args:
        environment: The variables, as `os.environ` has them.

    Returns:
        The meeting; None for a process on its own.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        size = int(environment["WORLD_SIZE"])
        local = int(environment.get("LOCAL_WORLD_SIZE", "1"))
        return Meeting(int(environment["RANK"]), size, local, None) if size > 1 else None
    # set by srun for the processes of a step, not for the script that sbatch runs
    size = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if size == 1 or "SLURM_PROCID" not in environment:
        return None
    host = environment.get("MASTER_ADDR") or _first_host(environment["SLURM_STEP_NODELIST"])
    job = int(environment.get("SLURM_JOB_ID", "0"))
    # jobs on the same machines need ports of their own, and all ranks have to know them
    port = environment.get("MASTER_PORT") or 20000 + job % 10000
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")  # such as 4(x2),3
    local = max(int(number) for number in re.findall(r"(?:^|,)(\d+)", tasks))
    return Meeting(int(environment["SLURM_PROCID"]), size, local, f"tcp://{host}:{port}")


def _first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts, such as ``node[07-09,12],other``."""
    found = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes
