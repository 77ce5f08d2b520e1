"""Evaluate: a model's perplexity and zero-shot accuracy, beside those of the dense model.

texts and tasks → model found, verified → loaded, scored, freed → the same for the dense one
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emp_llm.errors import OptionError
from emp_llm.evaluation.found_model import Found, find_model
from emp_llm.evaluation.model_loading import load_model
from emp_llm.evaluation.perplexity import perplexity
from emp_llm.evaluation.tasks import Tasks, find_tasks
from emp_llm.evaluation.zero_shot import score_tasks
from emp_llm.runtime.device_choice import check_device
from emp_llm.runtime.progress import Progress, Silent
from emp_llm.texts.texts import Text, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
from emp_llm.evaluation.options import EvalOptions
from emp_llm.evaluation.scores import Evaluation, ModelScores

__all__ = ["evaluate"]


def evaluate(
    model: str | os.PathLike[str] | PreTrainedModel,
    options: EvalOptions,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    against: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model's perplexity on texts and its answers to tasks.

    Models are loaded one after the other: never more than one of them is in memory, and measuring
    makes no copy of it. Before the first is loaded, texts and tasks are read and packed folders are
    verified.

    >>> from emp_llm import EvalOptions
    >>> options = EvalOptions(texts=("demo/text.txt",), context=128)
    >>> found = evaluate("demo/model", options)
    >>> 20 < found.model.texts["text.txt"].perplexity < 50
    True

    Args:
        model: A folder, dense or packed, or a model of the Hub; or a model that is loaded.
        options: What is measured, and how.
        tokenizer: The tokenizer of a loaded model; other models bring their own.
        against: A model to compare with, usually the dense one.
        revision: Branch, tag or commit of `model` on the Hub.
        progress: Reports how far the work is.

    Returns:
        The scores of both models.

    Raises:
        OptionError: If there is no such text, task or device, or a value is out of its range.
        CheckpointError: If a model cannot be loaded.
        HubError: If the Hub refuses a model or data.
        FormatError: If a packed folder is not as it was written.
    """
    progress = progress or Silent()
    given = model if isinstance(model, str | os.PathLike) else _Loaded.of(model, tokenizer)
    check_device(options.device)
    texts = _read_texts(options)
    include_path = None if options.include_path is None else Path(options.include_path)
    tasks = find_tasks(options.tasks, include_path) if options.tasks else None
    work = _Work(options, texts, tasks, progress)
    beside = None if against is None else find_model(against, progress=progress)
    if isinstance(given, _Loaded):
        scores = work.score(given.model, given.tokenizer, name=type(model).__name__)
    else:
        scores = work.score_found(find_model(given, revision=revision, progress=progress))
    return Evaluation(
        options=options,
        model=scores,
        against=None if beside is None else work.score_found(beside),
    )


def _read_texts(options: EvalOptions) -> list[Text]:
    texts = [read_text(name, protocol=options.protocol) for name in dict.fromkeys(options.texts)]
    names = [text.name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise OptionError(f"two texts are called {name}: rename one of the files")
    return texts


@dataclass(frozen=True)
class _Loaded:
    """A model that the caller has loaded."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> _Loaded:
        """Both; an OptionError without a tokenizer."""
        if tokenizer is None:
            raise OptionError("tokenizer is missing: give that of the loaded model with it")
        return cls(model, tokenizer)


@dataclass(frozen=True)
class _Work:
    """What is done with each model."""

    options: EvalOptions
    texts: list[Text]
    tasks: Tasks | None
    progress: Progress

    def score_found(self, found: Found) -> ModelScores:
        """Load a model, score it and free its memory."""
        from accelerate.utils.memory import clear_device_cache

        options = self.options
        try:
            # no variable holds the model, so that it is gone when its cache is cleared
            return self.score(
                *load_model(
                    found,
                    dtype=options.dtype,
                    device=options.device,
                    trust_remote_code=options.trust_remote_code,
                ),
                name=found.name,
                revision=found.source.revision,
                packed=found.packed,
            )
        finally:
            # models and lm-eval hold themselves in reference cycles
            clear_device_cache(garbage_collection=True)

    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        revision: str | None = None,
        packed: bool = False,
    ) -> ModelScores:
        """Score a model that is loaded."""
        import torch

        options = self.options
        try:
            texts = {
                text.name: perplexity(
                    model,
                    tokenizer,
                    text,
                    context=options.context,
                    protocol=options.protocol,
                    progress=self.progress,
                )
                for text in self.texts
            }
            tasks = (
                score_tasks(
                    model,
                    tokenizer,
                    self.tasks,
                    num_fewshot=options.num_fewshot,
                    limit=options.limit,
                    batch_size=options.batch_size,
                    progress=self.progress,
                )
                if self.tasks
                else {}
            )
        except torch.OutOfMemoryError as error:
            raise OptionError(
                f"{name}: the GPU's memory is too small for it: give a smaller context or batch "
                "size, another dtype, or the device cpu"
            ) from error
        return ModelScores(
            model=name,
            revision=revision,
            packed=packed,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            texts=texts,
            tasks=tasks,
        )
