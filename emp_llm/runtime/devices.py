"""What the threads of a run work on: GPUs, which they share in turn, or the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from emp_kernels.rows import Workspace

from emp_llm.errors import DeviceError
from emp_llm.messages import first_line

if TYPE_CHECKING:
    import torch

__all__ = ["CPU", "Devices"]


@dataclass(frozen=True)
class Devices:
    """What the kernels of a run work on.

    Attributes:
        gpus: The GPUs, which its threads share in turn; the CPU's kernels work where it is empty.
    """

    gpus: tuple[torch.device, ...] = ()

    @property
    def where(self) -> str:
        """Where the work is done, to be added to the name of a stage; empty for the CPU."""
        if not self.gpus:
            return ""
        if len(self.gpus) > 1:
            return f" on {len(self.gpus)} GPUs"
        return f" on {self.gpus[0]}" if self.gpus[0].type == "cuda" else " in Triton's interpreter"

    def workspace(self, thread: int) -> Workspace:
        """The workspace of a thread, to be made in it: thread i works on GPU i mod n."""
        if not self.gpus:
            return Workspace()
        from emp_kernels.gpu_workspace import DeviceWorkspace

        return DeviceWorkspace(self._gpu(thread))

    def explained(self, error: BaseException, thread: int) -> BaseException:
        """The error to raise for one that a thread failed with: a DeviceError if memory ran out.

        Args:
            error: The failure.
            thread: The thread's number.

        Returns:
            The DeviceError, or the failure itself.
        """
        # by its text, too: pinned memory and Triton have other errors than torch's memory
        if (
            not self.gpus
            or not isinstance(error, RuntimeError)
            or "out of memory" not in str(error)
        ):
            return error
        explained = DeviceError(
            f"{self._gpu(thread)}: has no room for its threads' row blocks "
            f"({first_line(error)}): end other programs on it, give fewer --threads, or "
            "--device cpu"
        )
        explained.__cause__ = error
        return explained

    def _gpu(self, thread: int) -> torch.device:
        return self.gpus[thread % len(self.gpus)]


CPU = Devices()
"""No GPU."""
