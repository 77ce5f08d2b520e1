"""Zero-shot accuracy: runs tasks of lm-eval on a model that is loaded already."""

from __future__ import annotations

import copy
import math
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from emp_llm.errors import OptionError
from emp_llm.evaluation.perplexity import evaluating
from emp_llm.evaluation.tasks import PAPER7, without_task_bars
from emp_llm.runtime.quiet import quiet_datasets
from emp_llm.texts.datasets_library import need

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from emp_llm.evaluation.tasks import Tasks
    from emp_llm.runtime.progress import Progress

__all__ = ["TaskScore", "score_tasks"]

_NO_METRICS = ("name", "alias", "sample_len", "sample_count")
_STDERR = "_stderr"


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """The scores of a task or of a group of tasks.

    Attributes:
        metrics: Values by the plain name of the metric, such as ``acc``; where lm-eval filtered
            the answers, a comma and the filter follow.
        stderr: Standard errors of the same, where lm-eval reports them.
        num_fewshot: Examples before each question; None for a group of different ones.
        samples: Questions that were answered.
        dataset: The Hub's identifier of the task's data, or the task's name where that is local.
    """

    metrics: Mapping[str, float]
    stderr: Mapping[str, float]
    num_fewshot: int | None
    samples: int
    dataset: str


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | None = 1,
    progress: Progress,
) -> dict[str, TaskScore]:
    """Score the answers of a loaded model to tasks, by ``lm_eval.simple_evaluate``.

    The model runs on the device it is on, in evaluation mode; afterwards every module is in the
    mode that it was in.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer; it is not changed.
        tasks: What `find_tasks` found.
        num_fewshot: Examples before each question; each task's own number if None, and for tasks
            that allow none.
        limit: Questions of each task; all if None.
        batch_size: Answers that are scored together; None finds the largest that fits on a GPU.
        progress: Advances by one for each answer that is scored.

    Returns:
        Scores by the name of the task or group, in lm-eval's order; behind them the mean accuracy
        of the paper's seven as ``paper7``, where all of them are there.

    Raises:
        OptionError: If the tokenizer has no token to begin a text with.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise OptionError(
            "tasks: the tokenizer has neither a token that begins a text nor one that ends it, "
            "lm-eval needs one of them: set eos_token in tokenizer_config.json"
        )
    if batch_size is None and model.device.type == "cpu":
        batch_size = 1  # lm-eval finds a size by trying until a GPU is out of memory
    # lm-eval prints batch sizes to stdout, and sets the padding of the tokenizer that it is given
    with (
        quiet_datasets(need("datasets")),
        evaluating(model),
        redirect_stdout(sys.stderr),
        without_task_bars(),
    ):
        lm = _language_model(model, copy.deepcopy(tokenizer), batch_size or "auto", progress)
        found = need("lm_eval").simple_evaluate(
            model=lm,
            tasks=list(tasks.objects),
            task_manager=tasks.manager,
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
        )
    scores = {name: _score(name, metrics, found) for name, metrics in found["results"].items()}
    return scores | _mean(scores)


def _language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int | str,
    progress: Progress,
) -> object:
    """The model as lm-eval calls it, which reports its progress instead of drawing bars."""
    base: Any = need("lm_eval.models.huggingface").HFLM

    class Advance:
        """A cache of answers that keeps none; it is given each as soon as it is scored."""

        def add_partial(self, *_: object) -> None:
            progress.advance(1)

    class Reporting(base):  # type: ignore[misc]
        def _loglikelihood_tokens(self, *args: object, **options: object) -> object:
            return super()._loglikelihood_tokens(*args, **{**options, "disable_tqdm": True})

        def _begin(self, requests: Sequence[object]) -> None:
            progress.begin("tasks", len(requests), "answers")

        def loglikelihood(self, requests: Sequence[object], **_: object) -> object:
            self._begin(requests)
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Sequence[object], **_: object) -> object:
            self._begin(requests)
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Sequence[object], **_: object) -> object:
            self._begin(requests)
            return super().generate_until(requests, disable_tqdm=True)

    lm = Reporting(
        pretrained=model,
        tokenizer=tokenizer,
        trust_remote_code=False,  # both are loaded already
        backend="causal",
        batch_size=batch_size,
    )
    lm.set_cache_hook(Advance())
    return lm


def _score(name: str, found: Mapping[str, Any], results: Mapping[str, Any]) -> TaskScore:
    metrics: dict[str, float] = {}
    stderr: dict[str, float] = {}
    for key, value in found.items():
        if key in _NO_METRICS or isinstance(value, str) or not isinstance(value, int | float):
            continue  # what lm-eval could not compute is a word
        metric, _, answers = key.partition(",")
        into = stderr if metric.endswith(_STDERR) else metrics
        plain = metric.removesuffix(_STDERR)
        into[plain if answers in ("", "none") else f"{plain},{answers}"] = float(value)
    dataset = results["configs"].get(name, {}).get("dataset_path")
    return TaskScore(
        metrics=metrics,
        stderr=stderr,
        num_fewshot=results["n-shot"].get(name),
        samples=int(found.get("sample_len", 0)),
        dataset=dataset if isinstance(dataset, str) and "/" in dataset else name,
    )


def _mean(scores: Mapping[str, TaskScore]) -> dict[str, TaskScore]:
    if not all(name in scores for name in PAPER7):
        return {}
    parts = [scores[name] for name in PAPER7]
    shots = {part.num_fewshot for part in parts}
    mean = TaskScore(
        metrics={"acc": fmean(part.metrics["acc"] for part in parts)},
        # of a mean of independent values; with one question each lm-eval reports no errors
        stderr={"acc": math.hypot(*(part.stderr.get("acc", math.nan) for part in parts)) / 7},
        num_fewshot=shots.pop() if len(shots) == 1 else None,
        samples=sum(part.samples for part in parts),
        dataset="paper7",
    )
    return {"paper7": mean}
