"""Finds tasks of lm-eval by name, with their data, before any model is loaded."""

from __future__ import annotations

import difflib
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from emp_llm.errors import OptionError
from emp_llm.runtime.quiet import quiet_datasets
from emp_llm.texts.datasets_library import explained, need

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

__all__ = ["PAPER7", "TaskManager", "Tasks", "find_tasks", "without_task_bars"]

PAPER7 = (
    *("boolq", "rte", "hellaswag", "winogrande"),
    *("arc_easy", "arc_challenge", "openbookqa"),
)
"""The tasks of the EMP paper, which ``paper7`` stands for."""

_REMEDY = (
    "give a task of your own whose data is a local file (--include-path FOLDER), or fetch it once "
    "where there is a network and bring HF_HOME along"
)


class TaskManager(Protocol):
    """The part of lm-eval's ``TaskManager`` that is used here.

    Attributes:
        all_subtasks: Names of single tasks.
        all_tasks: Names of tasks, groups and tags.
        task_index: The same names, each with its entry in the index.
    """

    all_subtasks: Collection[str]
    all_tasks: Sequence[str]
    task_index: Mapping[str, object]

    def load(self, tasks: Sequence[object]) -> dict[str, dict[str, Any]]:
        """Load tasks by their names: ``tasks`` and ``groups``, each by name."""


@dataclass(frozen=True)
class Tasks:
    """Tasks that were found; their data has been downloaded.

    Attributes:
        names: Their names, with ``paper7`` replaced by the seven.
        manager: The manager that found them.
        objects: The tasks and groups, as lm-eval takes them.
    """

    names: tuple[str, ...]
    manager: TaskManager
    objects: tuple[object, ...]


def find_tasks(names: Sequence[str], include_path: Path | None = None) -> Tasks:
    """Find tasks and download their data.

    Args:
        names: Tasks, groups and tags of lm-eval, files of YAML, or ``paper7``.
        include_path: A folder with more tasks, which come before lm-eval's own.

    Raises:
        OptionError: If there is no such task or folder, or it cannot be run here.
        HubError: If the data is not in the cache and the Hub cannot be reached.
    """
    if include_path is not None and not include_path.is_dir():
        raise OptionError(f"{include_path}: is not a folder; give one with lm-eval YAML files")
    asked = [part for name in names for part in (PAPER7 if name == "paper7" else (name,))]
    unique = tuple(dict.fromkeys(asked))
    with quiet_datasets(need("datasets")):
        manager = _manager(unique, include_path)
    objects: list[object] = []
    for name in unique:
        with explained(f"task {name}", _REMEDY), without_task_bars():
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


def _manager(names: Iterable[str], include_path: Path | None) -> TaskManager:
    """The tasks there are; lm-eval's own, which takes seconds, only where they are asked for."""
    tasks = need("lm_eval.tasks")
    manager: TaskManager
    if include_path is not None:
        own: TaskManager = tasks.TaskManager(include_path=str(include_path), include_defaults=False)
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
def _default_manager() -> TaskManager:
    manager: TaskManager = need("lm_eval.tasks").TaskManager()
    return manager


def _nearest(name: str, names: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name.lower(), names)
    return f", the nearest are {', '.join(nearest)}" if nearest else ""


def _check_runnable(tasks: Mapping[str, object]) -> None:
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise OptionError(
                f"task {name}: runs code that the model writes; emp-llm runs none: use lm-eval"
            )
        if getattr(task, "MULTIMODAL", False):
            raise OptionError(f"task {name}: needs more than text: use lm-eval")


@contextmanager
def without_task_bars() -> Iterator[None]:
    """Keep lm-eval from drawing a bar for each task whose questions it puts together."""
    module: Any = need("lm_eval.api.task")
    drawn = module.tqdm
    module.tqdm = partial(drawn, disable=True)
    try:
        yield
    finally:
        module.tqdm = drawn
