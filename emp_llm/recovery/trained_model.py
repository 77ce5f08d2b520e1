"""The whole model in memory, with the pruned weights that are trained and the dense ones in turn.

Trained are the kept weights of targets, norms and biases; everything else is the dense model's.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from emp_llm.calibration.tensor_loading import unchanged
from emp_llm.recovery.trained_weight import TrainedWeight

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import torch

    from emp_llm.calibration.session import Session
    from emp_llm.calibration.tensor_loading import Change

__all__ = ["TrainedModel"]


class TrainedModel:
    """A model in training.

    Args:
        session: The model and its samples; no unit of it is loaded.
        targets: Names of the tensors that are pruned.
        changed: Applied to tensors of the checkpoint: their masks, and repair.

    Attributes:
        weights: What is trained, by the parameters' names.
        vectors: The tensors of norms and biases, and the parameters that they become.

    Raises:
        CheckpointError: If the model cannot be loaded.
    """

    def __init__(self, session: Session, targets: Collection[str], changed: Change) -> None:
        model = self._model = session.model
        landings = model.map.landings
        pruned = {
            name for target in targets for name in (landings[target].name, *landings[target].others)
        }
        self.vectors = {
            name: where.name
            for name, where in landings.items()
            if where.whole and where.place.shape is not None and len(where.place.shape) == 1
            if model.model.get_parameter(where.name).is_floating_point()
        }
        trained = sorted(pruned.union(self.vectors.values()))
        model.load_whole(unchanged)
        dense = {name: model.model.get_parameter(name).data for name in trained}
        model.load_whole(changed, trained)
        self.weights = {
            name: TrainedWeight(model.model.get_parameter(name), dense[name], pruned=name in pruned)
            for name in trained
        }

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Within this ``with`` statement, the model is the dense one."""
        for weight in self.weights.values():
            weight.use_dense()
        try:
            yield
        finally:
            for weight in self.weights.values():
                weight.use_own()

    def targets(self, unit: str, names: Collection[str]) -> dict[str, torch.Tensor]:
        """The values of some targets of a unit as tensors of the checkpoint, by name.

        Raises:
            CheckpointError: If transformers cannot say which parameters a tensor becomes.
        """
        values = {
            name: parameter.detach() for name, parameter in self._model.parameters(unit).items()
        }
        return self._model.map.to_checkpoint(values, names)

    def vector(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The values of a norm or bias by the name of its tensor, and those of the dense model."""
        weight = self.weights[self.vectors[name]]
        return weight.parameter.detach(), weight.dense
