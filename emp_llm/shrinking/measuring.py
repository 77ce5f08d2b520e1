"""The model and smaller ones run on the calibration data, before any of them is written.

All are computed in float32: rounding of bfloat16 changes a loss about as much as a few structures
do.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from emp_llm.calibration.session import Session, recording
from emp_llm.calibration.tensor_loading import unchanged
from emp_llm.options import NO_TARGETS, PruneOptions
from emp_llm.pruning.plan import PruningPlan
from emp_llm.shrinking.unwritten import unwritten

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from emp_llm.calibration.samples import Samples
    from emp_llm.calibration.tensor_loading import Change
    from emp_llm.checkpoint.checkpoint import Checkpoint
    from emp_llm.options import CalibrationOptions
    from emp_llm.runtime.progress import SharedProgress
    from emp_llm.selection.mask_store import MaskStore
    from emp_llm.shrinking.choice import Choice
    from emp_llm.shrinking.plan import ShrinkPlan

__all__ = ["Measuring"]


class Measuring:
    """Runs a model, and what may become of it, on the same samples.

    Args:
        plan: The model and its structures.
        calibration: The data.
        progress: Reports the walks through the models.
        store: Keeps what is measured, for the same run when it is continued; activations that
            exceed the memory for them wait in its folder.

    Attributes:
        store: As above.
    """

    def __init__(
        self,
        plan: ShrinkPlan,
        calibration: CalibrationOptions,
        progress: SharedProgress,
        store: MaskStore,
    ) -> None:
        self._plan = plan
        self._options = PruneOptions(
            targets=NO_TARGETS, output_format="dense", calibration=calibration
        )
        self._progress = progress
        self.store = store
        self._samples: Samples | None = None

    @contextmanager
    def session(self, choices: Sequence[Choice] = ()) -> Iterator[Session]:
        """The model that some choices leave, or the whole one, and its samples.

        Raises:
            CheckpointError: As `emp_llm.shrinking.plan.ShrinkPlan.with_choices` and
                `emp_llm.calibration.session.Session` do.
            OptionError: As the latter does.
        """
        plan = self._plan
        checkpoint = unwritten(plan.with_choices(choices)) if choices else plan.checkpoint
        with self._opened(checkpoint) as session:
            if self._samples is None:
                self._samples = session.samples
                self.store.note("calibration", session.samples.description())
            yield session

    def loss(self, choices: Sequence[Choice], change: Change = unchanged) -> float:
        """The loss of a smaller model, nats per token.

        Args:
            choices: Which structures stay; of kinds without one all do.
            change: Given a tensor of the smaller model by its name, returns what it is repaired to.

        Raises:
            CheckpointError: As `session` does; if the model does not run or predicts no next token,
                or gives NaN or infinity.
            OptionError: As `session` does.
        """
        with self.session(choices) as session:
            session.begin("measuring a smaller model" if choices else "measuring the model")
            return session.loss(change)

    @contextmanager
    def _opened(self, checkpoint: Checkpoint) -> Iterator[Session]:
        plan = PruningPlan(
            source=self._plan.source,
            checkpoint=checkpoint,
            options=self._options,
            decisions={},
            missing=(),
            targets={shard.name: () for shard in checkpoint.shards},
        )
        with plan.source.files(checkpoint.shards) as files, recording():
            yield Session(
                plan, self._progress, files, self.store.folder, torch.float32, self._samples
            )
