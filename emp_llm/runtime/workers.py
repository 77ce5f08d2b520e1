"""What a run works with: threads and their devices, the ranks, and the progress of all of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from emp_llm.runtime.device_choice import worthwhile_devices
from emp_llm.runtime.devices import CPU, Devices
from emp_llm.runtime.gpu_gain import Work
from emp_llm.runtime.pipeline import Piece, run_pieces, thread_count
from emp_llm.runtime.progress import SharedProgress
from emp_llm.runtime.team import Team

__all__ = ["Workers"]


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Threads that work on the devices of this process, as one rank of a team.

    Attributes:
        threads: How many threads compute and write; 1 or more.
        progress: Reports stages and their advance.
        devices: GPUs that the threads share; the CPU's kernels are used without any.
        team: The ranks of the run.
    """

    threads: int
    progress: SharedProgress
    devices: Devices = CPU
    team: Team = field(default_factory=Team)

    @classmethod
    def find(
        cls,
        kernel: Literal["pack", "prune", "unpack"],
        nbytes: int,
        *,
        devices: Devices | None,
        threads: int | None,
        progress: SharedProgress,
        team: Team,
    ) -> "Workers":
        """Find what does a piece of work.

        Args:
            kernel: What is done with weights.
            nbytes: Bytes of the weights of this rank, dense; 0 for what is not worth a GPU.
            devices: What the user asked for; None for GPUs where they make the work faster.
            threads: What the user asked for; see `thread_count`.
            progress: Reports the work of all ranks.
            team: The ranks, all of which call this.

        Raises:
            OptionError: If `threads` is less than 1.
        """
        processes = team.local_size
        if devices is None:
            # threads beyond the cores make no kernel faster
            cores = min(thread_count(threads, processes), thread_count(None, processes))
            work = Work(kernel=kernel, nbytes=nbytes, cores=cores, processes=processes)
            devices = worthwhile_devices(work, team)
        team.forward_progress(progress.advance)
        count = thread_count(threads, processes, len(devices.gpus))
        return cls(threads=count, progress=progress, devices=devices, team=team)

    def run(self, pieces: Iterable[Piece], abandon: Callable[[], None]) -> None:
        """Run all pieces and report each; as `run_pieces`.

        Raises:
            RankError: If another rank failed.
        """
        run_pieces(
            pieces,
            threads=self.threads,
            devices=self.devices,
            progress=self.advance,
            abandon=abandon,
        )

    def advance(self, nbytes: int) -> None:
        """Report bytes of the stage as done.

        Raises:
            RankError: If another rank failed.
        """
        self.team.check(nbytes)
        self.progress.advance(nbytes)
