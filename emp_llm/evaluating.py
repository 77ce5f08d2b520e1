"""What pruning cost: a model's perplexity and its answers, beside those of the dense one.

texts and tasks → model found, verified → loaded, scored, let go → the dense one likewise
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from emp_llm.devices import check_device
from emp_llm.errors import OptionError
from emp_llm.evaluated_model import Dtype, Found, find_model, load_model
from emp_llm.evaluation import Subject, TaskResult
from emp_llm.perplexity import Perplexity, Protocol, check_protocol, perplexity
from emp_llm.progress import Progress, Silent
from emp_llm.texts import NAMES, Text, dataset_of, read_text
from emp_llm.zero_shot import Tasks, TaskScore, find_tasks, score_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["EvalOptions", "Evaluation", "Figure", "ModelScores", "evaluate"]

_TEXT_FIGURES = ("perplexity", "bits_per_byte")
_TITLES = dict(zip(NAMES, ("WikiText-2", "Penn Treebank", "C4"), strict=True))
_LANGUAGE_MODELING = Subject("text-generation", "Language modeling")
_ANSWERING = Subject("text-generation", "Zero-shot and few-shot tasks")


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What is measured, and how.

    Args:
        texts: Texts to measure the perplexity on, as `emp_llm.texts.read_text` takes them.
        tasks: Tasks of lm-eval, as `emp_llm.zero_shot.find_tasks` takes them; ``paper7`` are those
            of the EMP paper.
        protocol: How perplexity is computed, ``paper`` or ``gptq``; see `emp_llm.perplexity`.
        context: Tokens in a block of it.
        dtype: ``auto`` (as the weights are stored), ``bfloat16``, ``float16`` or ``float32``.
        device: ``auto`` (all GPUs there are, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
        include_path: A folder with more tasks.
        num_fewshot: Examples before each question; as each task has it if None.
        limit: Questions of each task; all if None.
        batch_size: Answers that are scored together; None finds the largest that fits on a GPU.

    Raises:
        OptionError: If there is nothing to measure or a value is out of its range.
    """

    texts: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    protocol: Protocol = "paper"
    context: int = 2048
    dtype: Dtype = "auto"
    device: str = "auto"
    include_path: str | os.PathLike[str] | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int | None = 1

    def __post_init__(self) -> None:
        for option in ("texts", "tasks"):
            if isinstance(getattr(self, option), str):
                raise OptionError(f"{option} is a single string; give a tuple of them")
        if not self.texts and not self.tasks:
            raise OptionError("there is nothing to measure: give texts, tasks or both")
        check_protocol(self.protocol)
        if self.dtype not in get_args(Dtype):
            raise OptionError(
                f"dtype is {self.dtype!r}; choose one of {', '.join(get_args(Dtype))}"
            )
        for option, fewest in (("context", 2), ("num_fewshot", 0), ("limit", 1), ("batch_size", 1)):
            value = getattr(self, option)
            if value is not None and value < fewest:
                raise OptionError(f"{option} is {value}; give {fewest} or more")


@dataclass(frozen=True, kw_only=True)
class ModelScores:
    """What one model came to.

    Attributes:
        model: What the user called it.
        revision: Its commit on the Hub; None if it was local.
        packed: Whether it was read packed.
        dtype: What its weights were, such as ``bfloat16``.
        device: Where its first weights lay.
        texts: Perplexities by the text's name.
        tasks: Figures of tasks by their name.
    """

    model: str
    revision: str | None
    packed: bool
    dtype: str
    device: str
    texts: Mapping[str, Perplexity]
    tasks: Mapping[str, TaskScore]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of the model, with that of the other one where there is one."""

    subject: str
    metric: str
    value: float
    stderr: float | None
    against: float | None
    against_stderr: float | None

    @property
    def difference(self) -> float | None:
        """The model's figure less the other one's."""
        return None if self.against is None else self.value - self.against


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        options: How.
        model: The model's scores.
        against: Those of the model it is compared with, if there is one.
    """

    options: EvalOptions
    model: ModelScores
    against: ModelScores | None

    def figures(self) -> Iterator[Figure]:
        """Every figure: perplexity and bits per byte of each text, then those of the tasks."""
        for name, found in self.model.texts.items():
            other = self.against.texts[name] if self.against else None
            for metric in _TEXT_FIGURES:
                yield Figure(
                    subject=name,
                    metric=metric,
                    value=getattr(found, metric),
                    stderr=None,
                    against=None if other is None else getattr(other, metric),
                    against_stderr=None,
                )
        for name, score in self.model.tasks.items():
            beside = self.against.tasks[name] if self.against else None
            for metric, value in score.figures.items():
                yield Figure(
                    subject=name,
                    metric=metric,
                    value=value,
                    stderr=score.stderr.get(metric),
                    against=None if beside is None else beside.figures[metric],
                    against_stderr=None if beside is None else beside.stderr.get(metric),
                )

    def results(self) -> tuple[TaskResult, ...]:
        """The same as a model card and the Hub take it; what is not finite is left out."""
        return tuple(
            TaskResult(
                task=_LANGUAGE_MODELING if figure.subject in self.model.texts else _ANSWERING,
                dataset=self._dataset(figure.subject),
                metric=Subject(figure.metric, f"{figure.metric} ({self._how(figure.subject)})"),
                value=figure.value,
                dense_value=_finite(figure.against),
                stderr=_finite(figure.stderr),
            )
            for figure in self.figures()
            if math.isfinite(figure.value)
        )

    def _dataset(self, subject: str) -> Subject:
        if subject in self.model.tasks:
            return Subject(self.model.tasks[subject].dataset, subject)
        return Subject(dataset_of(subject), _TITLES.get(subject, subject))

    def _how(self, subject: str) -> str:
        """What a figure depends on besides the model and the data."""
        if subject in self.model.texts:
            return f"per token, protocol {self.options.protocol}, context {self.options.context}"
        shots = self.model.tasks[subject].num_fewshot
        parts = ["lm-eval"] if shots is None else [f"{shots}-shot, lm-eval"]
        if self.options.limit is not None:
            parts.append(f"first {self.options.limit} questions")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON, every figure under its plain name; null where it is not finite."""
        content: dict[str, Any] = {
            "options": asdict(self.options)
            | {"include_path": self.options.include_path and os.fspath(self.options.include_path)},
            "model": _scores_dict(self.model),
            "against": None,
            "difference": None,
        }
        if self.against is not None:
            content["against"] = _scores_dict(self.against)
            difference: dict[str, Any] = {"texts": {}, "tasks": {}}
            for figure in self.figures():
                kind = "texts" if figure.subject in self.model.texts else "tasks"
                of_subject = difference[kind].setdefault(figure.subject, {})
                of_subject[figure.metric] = _finite(figure.difference)
            content["difference"] = difference
        return content


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

    Models are loaded one after the other: there is never more than one of them in memory, and
    measuring adds no copy of it. Texts and tasks are read and packed folders verified before the
    first one is loaded.

    Args:
        model: A folder, dense or packed, or a model of the Hub; or one that is loaded already.
        options: What is measured, and how.
        tokenizer: Goes with a loaded model; others bring their own.
        against: The model to compare with, mostly the one that was pruned.
        revision: Branch, tag or commit of `model` on the Hub.
        progress: Told how the work goes on.

    Returns:
        The figures of both.

    Raises:
        OptionError: If a text, a task, the device or a value is none that can be.
        CheckpointError: If a model cannot be loaded; HubError if the Hub refuses, also for data.
        FormatError: If a packed folder is not as it was written.
    """
    progress = progress or Silent()
    if not isinstance(model, str | os.PathLike) and tokenizer is None:
        raise OptionError("tokenizer is missing: give that of the loaded model with it")
    check_device(options.device)
    texts = _read_texts(options)
    include_path = None if options.include_path is None else Path(options.include_path)
    tasks = find_tasks(options.tasks, include_path) if options.tasks else None
    work = _Work(options, texts, tasks, progress)
    beside = None if against is None else find_model(against, progress=progress)
    if isinstance(model, str | os.PathLike):
        scores = work.score_found(find_model(model, revision=revision, progress=progress))
    else:
        assert tokenizer is not None  # noqa: S101 (checked above)
        scores = work.score(model, tokenizer, name=type(model).__name__)
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
class _Work:
    """What is done with each model."""

    options: EvalOptions
    texts: list[Text]
    tasks: Tasks | None
    progress: Progress

    def score_found(self, found: Found) -> ModelScores:
        """Load a model, score it and let it go."""
        import torch

        options = self.options
        try:
            model, tokenizer = load_model(found, dtype=options.dtype, device=options.device)
            return self.score(
                model,
                tokenizer,
                name=found.name,
                revision=found.source.revision,
                packed=found.packed,
            )
        finally:
            model = tokenizer = None  # type: ignore[assignment]
            gc.collect()  # models and lm-eval hold themselves in circles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

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


def _scores_dict(scores: ModelScores) -> dict[str, Any]:
    content = asdict(scores)
    for found in content["texts"].values():
        found.update({key: _finite(value) for key, value in found.items()})
    content["tasks"] = {
        name: {
            **{metric: _finite(value) for metric, value in score.figures.items()},
            **{f"{metric}_stderr": _finite(value) for metric, value in score.stderr.items()},
            "num_fewshot": score.num_fewshot,
            "samples": score.samples,
            "dataset": score.dataset,
        }
        for name, score in scores.tasks.items()
    }
    return content


def _finite(value: Any) -> Any:  # noqa: ANN401 (a number, or what else stands beside it)
    return None if isinstance(value, float) and not math.isfinite(value) else value
