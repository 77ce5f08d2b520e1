"""Silences other libraries for a while: their logs, progress bars and warnings."""

from __future__ import annotations

import gc
import logging
import sys
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import ModuleType

__all__ = [
    "calm",
    "hub_bars_on_terminals",
    "quiet_datasets",
    "quiet_transformers",
    "transformers_without_bars",
]

_DATA_LOGGERS = ("datasets", "huggingface_hub", "lm_eval")


class _Bars(NamedTuple):
    """How a library is told whether to draw progress bars."""

    drawn: bool
    disable: Callable[[], object]
    enable: Callable[[], object]


@contextmanager
def calm() -> Iterator[None]:
    """Keep transformers silent and its imports quick: no logging, warnings or garbage collection.

    Collecting garbage while thousands of modules are imported takes a fifth of the whole time and
    finds next to none.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _logging_from(logging.CRITICAL):  # transformers logs nothing as critical
                yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Have transformers log errors only, and draw the bar of loading on a terminal only."""
    with _logging_from(logging.ERROR), _without([] if _on_terminal() else [_transformers_bars()]):
        yield


@contextmanager
def transformers_without_bars() -> Iterator[None]:
    """Have transformers draw no bar, on a terminal either."""
    with _without([_transformers_bars()]):
        yield


@contextmanager
def quiet_datasets(datasets: ModuleType) -> Iterator[None]:
    """Have datasets, huggingface_hub and lm-eval log nothing, and draw bars on a terminal only.

    Args:
        datasets: The library, which is imported only where it is installed.
    """
    loggers = [logging.getLogger(name) for name in _DATA_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    own = datasets.utils
    bars = _Bars(own.is_progress_bar_enabled(), own.disable_progress_bars, own.enable_progress_bars)
    try:
        with _without([] if _on_terminal() else [bars, _hub_bars()]):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def hub_bars_on_terminals() -> Iterator[None]:
    """Have huggingface_hub draw bars on a terminal only, unless its environment variable is set."""
    with _without([] if _on_terminal() else [_hub_bars()]):
        yield


def _on_terminal() -> bool:
    return sys.stderr.isatty()


@contextmanager
def _logging_from(level: int) -> Iterator[None]:
    """Have transformers log only what is of this level or above."""
    from transformers.utils.logging import get_verbosity, set_verbosity

    before = get_verbosity()
    set_verbosity(level)
    try:
        yield
    finally:
        set_verbosity(before)


@contextmanager
def _without(libraries: Iterable[_Bars]) -> Iterator[None]:
    drawn = [bars for bars in libraries if bars.drawn]
    for bars in drawn:
        bars.disable()
    try:
        yield
    finally:
        for bars in drawn:
            bars.enable()


def _transformers_bars() -> _Bars:
    from transformers.utils import logging as own

    return _Bars(own.is_progress_bar_enabled(), own.disable_progress_bar, own.enable_progress_bar)


def _hub_bars() -> _Bars:
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    # where the variable is set, it decides, and both calls warn that they do nothing
    free = constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    drawn = free and not are_progress_bars_disabled()
    return _Bars(drawn, disable_progress_bars, enable_progress_bars)
