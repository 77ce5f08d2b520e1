"""Fine-tuning that keeps pruned weights at zero, with ``Trainer`` or in your own loop."""

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

from torch import nn
from transformers import TrainerCallback, TrainerState

from emp_llm.errors import CheckpointError
from emp_llm.integration.saving import saved_as_in_memory
from emp_llm.integration.zero_mask import Mask
from emp_llm.integration.zeros import find_pruned, recorded, take_masks

__all__ = ["KeepSparsity", "SparsityHold"]


class SparsityHold:
    """Keeps the pruned weights of a model at zero while it is trained.

    From its creation on, gradients of pruned weights are zero, so that they count neither in the
    gradient's norm nor in an optimizer's moments. `apply` after each step makes the weights +0.0
    again, whatever the optimizer did to them. It takes one bit a weight, on the weights' device.

        hold = SparsityHold(model)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            hold.apply()
            optimizer.zero_grad()
        hold.release()

    It is a context manager too, which calls `release` at the end. Create it before or after the
    model is wrapped by DDP, PEFT or ``torch.compile``, but only when the model is on its device and
    has the parameters that will be trained: adapters that train copies of pruned layers must have
    been added.

    Args:
        model: A pruned model: loaded through emp-llm, or any other with `parameters`.
        parameters: Names of the pruned parameters, or regular expressions searched in the names
            of matrices; each zero in them is kept. Not needed for a model that was pruned while it
            was loaded, or loaded from a packed checkpoint.

    Raises:
        OptionError: If it is not known what was pruned, or a parameter has no zero, is offloaded,
            or is split over processes.
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
                # As soon as a gradient is accumulated, so that clipping and the scaler of float16
                # see it masked. DDP averages gradients after this hook.
                add: Any = parameter.register_post_accumulate_grad_hook
                handle = add(partial(_clear, mask))
                self._hooks.callback(handle.remove)

    def apply(self) -> None:
        """Set the pruned weights of all parameters that are trained to +0.0."""
        for _, parameter, mask in self._held:
            if parameter.requires_grad:
                mask.clear(parameter)

    def release(self) -> None:
        """Stop: gradients are no longer masked, and `apply` does nothing."""
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
        """Whether an object created now would keep zeros in the very same parameters."""
        found = [
            id(parameter)
            for copies in find_pruned(model, parameters).values()
            for parameter in copies
        ]
        return found == [id(parameter) for _, parameter, _ in self._held]

    def lost(self) -> dict[str, int]:
        """How many zeros each parameter has lost, by name; those that lost none are left out."""
        counts = {name: mask.lost(parameter) for name, parameter, mask in self._held}
        return {name: count for name, count in counts.items() if count}


class KeepSparsity(TrainerCallback):
    """Keeps pruned weights at zero while transformers' ``Trainer`` trains a model.

    >>> from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
    >>> from emp_llm import EmpConfig
    >>> model = AutoModelForCausalLM.from_pretrained(
    ...     "demo/model", quantization_config=EmpConfig(beta=1.0)
    ... )
    >>> tokenizer = AutoTokenizer.from_pretrained("demo/model")
    >>> tokens = tokenizer("The weights say how many of them to keep.")["input_ids"]
    >>> trainer = Trainer(
    ...     model,
    ...     TrainingArguments("checkpoints", max_steps=2, report_to="none", use_cpu=True),
    ...     train_dataset=[{"input_ids": tokens, "labels": tokens}],
    ...     callbacks=[KeepSparsity()],
    ... )
    >>> trainer.train().global_step  # doctest: +ELLIPSIS
    {...}
    2
    >>> trainer.save_model("tuned")  # packed, because the model was pruned on loading

    The zeros are those of the model that ``Trainer`` is given. They are +0.0 after every optimizer
    step, and so in every checkpoint. During training such a model saves ordinary checkpoints,
    because ``Trainer`` reads them back by itself, to resume and to load the best one; afterwards
    the model saves itself packed again. See `SparsityHold` for which parameters are meant.

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

    def on_init_end(self, *_: object, **given: object) -> None:
        """Take the masks now: a checkpoint that training resumes from is loaded after this."""
        self._hold = SparsityHold(_model(given), parameters=self._parameters)

    def on_train_begin(self, *states: object, **given: object) -> None:
        """Begin to keep the zeros."""
        model = _model(given)
        self._saving.close()  # if a training before this one failed
        hold = self._hold
        # Trainer gives its state by position, other loops may give it by name
        known = *states, *given.values()
        resumed = any(isinstance(one, TrainerState) and one.global_step for one in known)
        if resumed and hold is not None and hold.holds(model, self._parameters):
            # Not the zeros of the checkpoint: a trained weight may happen to be zero in it.
            _check_resumed(hold)
        else:
            self.release()
            hold = SparsityHold(model, parameters=self._parameters)
        self._hold = hold
        for part in recorded(model):
            self._saving.enter_context(saved_as_in_memory(part))

    def on_optimizer_step(self, *_: object, **__: object) -> None:
        """Set pruned weights to zero."""
        if self._hold is not None:
            self._hold.apply()

    def on_train_end(self, *_: object, **__: object) -> None:
        """Stop. If the best checkpoint was to be loaded, it has been."""
        if self._hold is not None:
            self._hold.apply()
        self.release()

    def release(self) -> None:
        """Stop, as at the end of training.

        Call it after a training that failed or was interrupted, because ``Trainer`` does not report
        that. A new training does so by itself.
        """
        self._saving.close()
        if self._hold is not None:
            self._hold.release()
            self._hold = None


def _model(given: Mapping[str, object]) -> nn.Module:
    """The model, among what ``Trainer`` gives to callbacks."""
    model = given["model"]
    if not isinstance(model, nn.Module):
        raise TypeError(f"Trainer gave a {type(model).__name__} as the model; it must be a module")
    return model


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
