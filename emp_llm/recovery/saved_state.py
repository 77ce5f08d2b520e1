"""The state of a training on disk: a run that was killed goes on from it to the same bytes.

The file appears in one step, so it is whole; it describes the training after a number of steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from emp_llm.files.atomic import flush_path, replacing
from emp_llm.output.journal import TRAINING_NAME

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from emp_llm.recovery.trained_weight import TrainedWeight

__all__ = ["SavedState"]

_STEPS = "steps"


class SavedState:
    """The state of a training in a folder.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / TRAINING_NAME

    def save(self, steps: int, weights: Mapping[str, TrainedWeight]) -> None:
        """Save the state after so many steps.

        Raises:
            OSError: If it cannot be written.
        """
        tensors = {
            f"{part}.{name}": tensor
            for name, weight in weights.items()
            for part, tensor in weight.state.items()
        }
        with replacing(self._path) as unfinished:
            try:
                save_file(tensors, unfinished, {_STEPS: str(steps)})
            except SafetensorError as error:  # what it makes of an error of the file system
                raise OSError(str(error)) from error
        flush_path(self._path.parent)

    def load(self, weights: Mapping[str, TrainedWeight]) -> int:
        """Put a state that was saved in place.

        Returns:
            After how many steps it was saved; 0 if there is none.
        """
        if not self._path.exists():
            return 0
        with safe_open(self._path, framework="pt") as file:
            for name, weight in weights.items():
                for part, tensor in weight.state.items():
                    tensor.copy_(file.get_tensor(f"{part}.{name}"))
                weight.round()
            return int(file.metadata()[_STEPS])

    def remove(self) -> None:
        """Delete the file, if there is one."""
        self._path.unlink(missing_ok=True)
