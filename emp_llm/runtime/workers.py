"""What a run works with: threads and their devices, the ranks, and the progress of all of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from emp_llm.runtime.devices import CPU, Devices
from emp_llm.runtime.pipeline import Piece, run_pieces
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
