"""Fine-tuning that keeps the zeros: with transformers' ``Trainer``, and in any other loop."""

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from emp_llm.errors import CheckpointError
from emp_llm.integration.saving import saved_as_in_memory
from emp_llm.integration.zeros import Mask, find_pruned, recorded, take_masks

__all__ = ["KeepSparsity", "SparsityHold"]


class SparsityHold:
    """Holds the zeros of a pruned model while it is trained.

    From when it is made, gradients of pruned weights are zero, so that neither the gradient's norm
    nor an optimizer's moments know of them. `apply` after each step makes the weights +0.0 again,
    whatever the optimizer did to them. It costs one bit a weight, on the weights' device.

        hold = SparsityHold(model)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            hold.apply()
            optimizer.zero_grad()
        hold.release()

    It is a context manager too, which releases at the end. Make it before or after the model is
    wrapped by DDP, PEFT or ``torch.compile``, but after it is on its device and its parameters are
    what will be trained: adapters that train copies of pruned layers have to be there already.

    Args:
        model: A pruned model: loaded through emp-llm, or any other with `parameters`.
        parameters: Names of the pruned parameters, or regular expressions searched in the names
            of matrices; each zero in them is held. Not needed for a model that was pruned while it
            was loaded, or loaded from a packed checkpoint.

    Raises:
        OptionError: If it is not known what was pruned, a parameter holds no zero, or it is
            offloaded or split over processes.
    """

    def __init__(self, model: nn.Module, *, parameters: str | Sequence[str] | None = None) -> None:
        masks = take_masks(model, parameters)
        self._held = [
            (name, parameter, masks[name])
            for name, copies in find_pruned(model, parameters).items()
            for parameter in copies
        ]
        self._hooks = ExitStack()
        self._finalize = weakref.finalize(self, self._hooks.close)
        for _, parameter, mask in self._held:
            if parameter.requires_grad:
                # As soon as a gradient is there: later, clipping and the scaler of float16 have
                # seen it already. DDP averages gradients after this hook.
                add: Any = parameter.register_post_accumulate_grad_hook
                handle = add(partial(_clear, mask))
                self._hooks.callback(handle.remove)

    def apply(self) -> None:
        """Make the pruned weights of all parameters that are trained +0.0 again."""
        for _, parameter, mask in self._held:
            if parameter.requires_grad:
                mask.clear(parameter)

    def release(self) -> None:
        """Let gradients through again; the zeros are no longer held."""
        self._finalize()
        self._held = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def holds(self, model: nn.Module, parameters: str | Sequence[str] | None) -> bool:
        """Whether these are the parameters that it would hold if it were made now."""
        found = [
            id(parameter)
            for copies in find_pruned(model, parameters).values()
            for parameter in copies
        ]
        return found == [id(parameter) for _, parameter, _ in self._held]

    def lost(self) -> dict[str, int]:
        """How many zeros each parameter has lost, of those that have."""
        counts = {name: mask.lost(parameter) for name, parameter, mask in self._held}
        return {name: count for name, count in counts.items() if count}


class KeepSparsity(TrainerCallback):
    """Keeps pruned weights at zero while transformers' ``Trainer`` trains a model.

        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[KeepSparsity()])
        trainer.train()
        trainer.save_model("tuned")  # packed, if the model was pruned or unpacked on loading

    The zeros are those of the model that ``Trainer`` is given. After every optimizer step they are
    +0.0, and so they are in every checkpoint. While it trains, a model that saves itself packed
    saves ordinary checkpoints, for ``Trainer`` reads them back on its own, to resume and to load
    the best one; afterwards it saves itself packed again. See `SparsityHold` for what is held.

    Args:
        parameters: As for `SparsityHold`.

    Raises:
        OptionError: When ``Trainer`` is made or training begins, as `SparsityHold` does.
        CheckpointError: When training is resumed from a checkpoint that lacks the zeros.
    """

    def __init__(self, *, parameters: str | Sequence[str] | None = None) -> None:
        self._parameters = parameters
        self._hold: SparsityHold | None = None
        self._saving = ExitStack()
        self._finalize = weakref.finalize(self, self._saving.close)

    def on_init_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Take the masks: a checkpoint that training is resumed from is loaded after this."""
        self._hold = SparsityHold(kwargs["model"], parameters=self._parameters)

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Hold the zeros."""
        model: nn.Module = kwargs["model"]
        self._saving.close()  # if a training before this one failed
        hold = self._hold
        resumed = state.global_step > 0
        if resumed and hold is not None and hold.holds(model, self._parameters):
            # Not the zeros of the checkpoint: a weight may pass through zero as it is trained.
            _check_resumed(hold)
        else:
            self.release()
            hold = SparsityHold(model, parameters=self._parameters)
        self._hold = hold
        for part in recorded(model):
            self._saving.enter_context(saved_as_in_memory(part))

    def on_optimizer_step(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ANN401, ARG002
    ) -> None:
        """Make pruned weights zero again."""
        if self._hold is not None:
            self._hold.apply()

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ANN401, ARG002
    ) -> None:
        """Let go; the best checkpoint, if it was to be loaded, has been."""
        if self._hold is not None:
            self._hold.apply()
        self.release()

    def release(self) -> None:
        """Let go of the model, as at the end of training.

        Call it after a training that failed or was interrupted, for ``Trainer`` does not tell; a
        training that begins anew does so itself.
        """
        self._saving.close()
        if self._hold is not None:
            self._hold.release()
            self._hold = None


def _clear(mask: Mask, parameter: nn.Parameter) -> None:
    if parameter.grad is not None:
        mask.clear(parameter.grad)


def _check_resumed(hold: SparsityHold) -> None:
    lost = hold.lost()
    if lost:
        name, count = next(iter(lost.items()))
        raise CheckpointError(
            f"{name!r} has {count} weights in the checkpoint that training is resumed from which "
            f"are zero in the model that Trainer was given ({len(lost)} parameters have such): it "
            "was written without KeepSparsity, or by a training of a model pruned otherwise; "
            "resume from another checkpoint, or give Trainer the model that this one came from"
        )
