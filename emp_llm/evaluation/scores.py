"""The results of an evaluation: score by score, as JSON, and for the model card."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from emp_llm.evaluation.options import EvalOptions
from emp_llm.evaluation.perplexity import Perplexity
from emp_llm.evaluation.zero_shot import TaskScore
from emp_llm.report.evaluation_results import Subject, TaskResult
from emp_llm.texts.texts import NAMES, dataset_of

T = TypeVar("T")

__all__ = ["Evaluation", "ModelScores", "Score"]


_TEXT_METRICS = ("perplexity", "bits_per_byte")
_TITLES = dict(zip(NAMES, ("WikiText-2", "Penn Treebank", "C4"), strict=True))
_LANGUAGE_MODELING = Subject("text-generation", "Language modeling")
_ANSWERING = Subject("text-generation", "Zero-shot and few-shot tasks")


@dataclass(frozen=True, kw_only=True)
class ModelScores:
    """The scores of one model.

    Attributes:
        model: The name that the user gave.
        revision: Its commit on the Hub; None if it was local.
        packed: Whether it was read packed.
        dtype: The dtype of its weights, such as ``bfloat16``.
        device: Where its first weights were.
        texts: Perplexities by the text's name.
        tasks: Scores of tasks by their name.
    """

    model: str
    revision: str | None
    packed: bool
    dtype: str
    device: str
    texts: Mapping[str, Perplexity]
    tasks: Mapping[str, TaskScore]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of the model, beside that of the model it is compared with, if there is one.

    Attributes:
        subject: The text or task.
        metric: What was measured on it, such as ``perplexity`` or ``acc``.
        value: The number; it may be infinite or NaN.
        stderr: Its standard error, where lm-eval reports one.
        against: The other model's number; None if there is no other model.
        against_stderr: Its standard error.
    """

    subject: str
    metric: str
    value: float
    stderr: float | None
    against: float | None
    against_stderr: float | None

    @property
    def difference(self) -> float | None:
        """`value` less `against`; None if there is no other model."""
        return None if self.against is None else self.value - self.against


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        options: What was measured, and how.
        model: The model's scores.
        against: Those of the model it is compared with, if there is one.
    """

    options: EvalOptions
    model: ModelScores
    against: ModelScores | None

    def scores(self) -> Iterator[Score]:
        """Every number: perplexity and bits per byte of each text, then those of the tasks."""
        for name, found in self.model.texts.items():
            other = self.against.texts[name] if self.against else None
            for metric in _TEXT_METRICS:
                yield Score(
                    subject=name,
                    metric=metric,
                    value=getattr(found, metric),
                    stderr=None,
                    against=None if other is None else getattr(other, metric),
                    against_stderr=None,
                )
        for name, task in self.model.tasks.items():
            beside = self.against.tasks[name] if self.against else None
            for metric, value in task.metrics.items():
                yield Score(
                    subject=name,
                    metric=metric,
                    value=value,
                    stderr=task.stderr.get(metric),
                    against=None if beside is None else beside.metrics[metric],
                    against_stderr=None if beside is None else beside.stderr.get(metric),
                )

    def results(self) -> tuple[TaskResult, ...]:
        """The same as a model card and the Hub take it; what is not finite is left out."""
        return tuple(
            TaskResult(
                task=_LANGUAGE_MODELING if score.subject in self.model.texts else _ANSWERING,
                dataset=self._dataset(score.subject),
                metric=Subject(score.metric, f"{score.metric} ({self._how(score.subject)})"),
                value=score.value,
                dense_value=_finite(score.against),
                stderr=_finite(score.stderr),
            )
            for score in self.scores()
            if math.isfinite(score.value)
        )

    def _dataset(self, subject: str) -> Subject:
        if subject in self.model.tasks:
            return Subject(self.model.tasks[subject].dataset, subject)
        return Subject(dataset_of(subject), _TITLES.get(subject, subject))

    def _how(self, subject: str) -> str:
        """What a number depends on besides the model and the data."""
        if subject in self.model.texts:
            return f"per token, protocol {self.options.protocol}, context {self.options.context}"
        shots = self.model.tasks[subject].num_fewshot
        parts = ["lm-eval"] if shots is None else [f"{shots}-shot, lm-eval"]
        if self.options.limit is not None:
            parts.append(f"first {self.options.limit} questions")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON, every number under its plain name; null where it is not finite."""
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
            for score in self.scores():
                kind = "texts" if score.subject in self.model.texts else "tasks"
                of_subject = difference[kind].setdefault(score.subject, {})
                of_subject[score.metric] = _finite(score.difference)
            content["difference"] = difference
        return content


def _scores_dict(scores: ModelScores) -> dict[str, Any]:
    content = asdict(scores)
    for found in content["texts"].values():
        found.update({key: _finite(value) for key, value in found.items()})
    content["tasks"] = {
        name: {
            **{metric: _finite(value) for metric, value in score.metrics.items()},
            **{f"{metric}_stderr": _finite(value) for metric, value in score.stderr.items()},
            "num_fewshot": score.num_fewshot,
            "samples": score.samples,
            "dataset": score.dataset,
        }
        for name, score in scores.tasks.items()
    }
    return content


def _finite(value: T) -> T | None:
    """The value, or None for a number that is infinite or NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
