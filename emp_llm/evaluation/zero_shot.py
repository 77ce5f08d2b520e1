"""How well a model answers: tasks of lm-eval, on a model that is loaded already.

names → found, their data there → simple_evaluate → figures by task
"""

from __future__ import annotations

import copy
import difflib
import math
import sys
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from emp_llm.errors import OptionError
from emp_llm.evaluation.perplexity import evaluating
from emp_llm.texts.datasets_library import explained, need, quiet

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from emp_llm.runtime.progress import Progress

__all__ = ["PAPER7", "TaskScore", "Tasks", "find_tasks", "score_tasks"]

PAPER7 = (
    *("boolq", "rte", "hellaswag", "winogrande"),
    *("arc_easy", "arc_challenge", "openbookqa"),
)
"""The tasks of the EMP paper, which ``paper7`` stands for."""

_REMEDY = (
    "give a task of your own whose data is a local file (--include-path FOLDER), or fetch it once "
    "where there is a network and bring HF_HOME along"
)
_NO_FIGURES = ("name", "alias", "sample_len", "sample_count")
_STDERR = "_stderr"


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """What a task, or a group of tasks, came to.

    Attributes:
        figures: By the plain name of the metric, such as ``acc``; with a comma and the filter
            behind it where lm-eval filtered the answers.
        stderr: Standard errors of the same, where lm-eval tells them.
        num_fewshot: Examples before each question; None for a group of different ones.
        samples: Questions that were answered.
        dataset: The Hub's identifier of the task's data, or the task's name where that is local.
    """

    figures: Mapping[str, float]
    stderr: Mapping[str, float]
    num_fewshot: int | None
    samples: int
    dataset: str


@dataclass(frozen=True)
class Tasks:
    """Tasks that were found, with their data.

    Attributes:
        names: As they were asked for, ``paper7`` spelled out.
    """

    names: tuple[str, ...]
    _manager: Any
    _objects: tuple[Any, ...]


def find_tasks(names: Sequence[str], include_path: Path | None = None) -> Tasks:
    """Find tasks and fetch their data.

    Args:
        names: Tasks, groups and tags of lm-eval, files of YAML, or ``paper7``.
        include_path: A folder with more tasks, which come before lm-eval's own.

    Raises:
        OptionError: If there is no such task or folder, or it cannot be run here.
        HubError: If the data is not in the cache and the Hub cannot be reached.
    """
    if include_path is not None and not include_path.is_dir():
        raise OptionError(f"{include_path}: is no folder; give one with files of YAML for lm-eval")
    asked = [part for name in names for part in (PAPER7 if name == "paper7" else (name,))]
    unique = tuple(dict.fromkeys(asked))
    with quiet():
        manager = _manager(unique, include_path)
    objects: list[Any] = []
    for name in unique:
        with explained(f"task {name}", _REMEDY), _without_bars():
            try:
                found = manager.load([name])
            except ImportError as error:
                raise OptionError(
                    f"task {name}: needs the module {error.name!r}: install it"
                ) from error
        groups, tasks = found.get("groups", {}), found["tasks"]
        _check_runnable(tasks)
        objects.extend([groups[name]] if name in groups else tasks.values())
    try:
        manager.load(objects)
    except ValueError as error:  # a task in two groups
        raise OptionError(f"tasks: {error}: leave one of them out") from error
    return Tasks(unique, manager, tuple(objects))


def _manager(names: Iterable[str], include_path: Path | None) -> Any:  # noqa: ANN401 (lm-eval's)
    """The tasks there are; lm-eval's own, which takes seconds, only where they are asked for."""
    tasks = need("lm_eval.tasks")
    if include_path is not None:
        own = tasks.TaskManager(include_path=str(include_path), include_defaults=False)
        if all(name in own.all_subtasks for name in names):
            return own
        manager = tasks.TaskManager(include_path=str(include_path))
    else:
        manager = _default_manager()
    for name in names:
        is_file = name.endswith((".yaml", ".yml")) and Path(name).is_file()
        if name not in manager.task_index and not is_file:
            raise OptionError(
                f"there is no task {name!r}{_nearest(name, manager.all_tasks)}; "
                "`lm-eval ls tasks` lists all, --include-path FOLDER adds your own"
            )
    return manager


@cache
def _default_manager() -> Any:  # noqa: ANN401 (lm-eval's)
    return need("lm_eval.tasks").TaskManager()


def _nearest(name: str, names: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name.lower(), names)
    return f", the nearest are {', '.join(nearest)}" if nearest else ""


def _check_runnable(tasks: Mapping[str, Any]) -> None:
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise OptionError(
                f"task {name}: runs code that the model writes, which emp-llm does not: use lm-eval"
            )
        if getattr(task, "MULTIMODAL", False):
            raise OptionError(f"task {name}: is not one of text alone: use lm-eval")


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
    """Have a model that is loaded answer tasks, by ``lm_eval.simple_evaluate``.

    The model is used where it lies, in evaluation mode; every module's mode is restored.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer; it is left as it is.
        tasks: What `find_tasks` found.
        num_fewshot: Examples before each question; each task's own number if None, and for tasks
            that insist on none.
        limit: Questions of each task; all if None.
        batch_size: Answers that are scored together; None finds the largest that fits on a GPU.
        progress: Told of the answers that are scored.

    Returns:
        Figures by the name of the task or group, in lm-eval's order; behind them the mean accuracy
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
        batch_size = 1  # it is found by running out of a GPU's memory
    # lm-eval prints the batch sizes that it finds, and sets the tokenizer's padding
    with quiet(), evaluating(model), redirect_stdout(sys.stderr), _without_bars():
        lm = _language_model(model, copy.deepcopy(tokenizer), batch_size or "auto", progress)
        found = need("lm_eval").simple_evaluate(
            model=lm,
            tasks=list(tasks._objects),
            task_manager=tasks._manager,
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
        )
    scores = {name: _score(name, figures, found) for name, figures in found["results"].items()}
    return scores | _mean(scores)


def _language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int | str,
    progress: Progress,
) -> Any:  # noqa: ANN401 (lm-eval's)
    """The model as lm-eval calls it, which tells of its progress in place of drawing bars."""
    base: Any = need("lm_eval.models.huggingface").HFLM

    class Advance:
        """Told of each answer, to keep it; nothing is kept."""

        def add_partial(self, *_answer: object) -> None:
            progress.advance(1)

    class Telling(base):  # type: ignore[misc]
        def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> Any:  # noqa: ANN401
            return super()._loglikelihood_tokens(
                requests, *args, **options | {"disable_tqdm": True}
            )

        def _begin(self, requests: Sequence[object]) -> None:
            progress.begin("tasks", len(requests), "answers")

        def loglikelihood(self, requests: Sequence[object], **_options: object) -> Any:  # noqa: ANN401
            self._begin(requests)
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Sequence[object], **_options: object) -> Any:  # noqa: ANN401
            self._begin(requests)
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Sequence[object], **_options: object) -> Any:  # noqa: ANN401
            self._begin(requests)
            return super().generate_until(requests, disable_tqdm=True)

    lm = Telling(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    lm.set_cache_hook(Advance())
    return lm


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep lm-eval from drawing a bar for each task whose questions it puts together."""
    module: Any = need("lm_eval.api.task")
    drawn = module.tqdm
    module.tqdm = partial(drawn, disable=True)
    try:
        yield
    finally:
        module.tqdm = drawn


def _score(name: str, found: Mapping[str, Any], results: Mapping[str, Any]) -> TaskScore:
    figures: dict[str, float] = {}
    stderr: dict[str, float] = {}
    for key, value in found.items():
        if key in _NO_FIGURES or isinstance(value, str) or not isinstance(value, int | float):
            continue  # what lm-eval could not compute is a word
        metric, _, answers = key.partition(",")
        into = stderr if metric.endswith(_STDERR) else figures
        plain = metric.removesuffix(_STDERR)
        into[plain if answers in ("", "none") else f"{plain},{answers}"] = float(value)
    dataset = results["configs"].get(name, {}).get("dataset_path")
    return TaskScore(
        figures=figures,
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
        figures={"acc": fmean(part.figures["acc"] for part in parts)},
        # of the mean of independent figures; with one question each lm-eval tells none
        stderr={"acc": math.hypot(*(part.stderr.get("acc", math.nan) for part in parts)) / 7},
        num_fewshot=shots.pop() if len(shots) == 1 else None,
        samples=sum(part.samples for part in parts),
        dataset="paper7",
    )
    return {"paper7": mean}
