"""Reads data sets through the library `datasets`; its errors become one line."""

from __future__ import annotations

from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

from emp_llm.errors import HubError, OptionError
from emp_llm.messages import first_line
from emp_llm.runtime.quiet import quiet_datasets

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

__all__ = ["explained", "need"]


def need(module: str) -> ModuleType:
    """Import a module of the extra ``eval``.

    Raises:
        OptionError: If it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise OptionError(
            f"{error.name} is not installed, which this needs: run pip install 'emp-llm[eval]'"
        ) from error


@contextmanager
def explained(name: str, remedy: str) -> Iterator[ModuleType]:
    """Give the library `datasets`, quiet, and make what it raises one of our errors.

    Args:
        name: What is read.
        remedy: What to do where the Hub cannot be reached.

    Raises:
        OptionError: If the library is not installed or what is read is not as it must be.
        HubError: If the Hub, or the way to it, refuses.
    """
    datasets = need("datasets")
    refusals = (datasets.exceptions.DatasetsError, ValueError, RuntimeError)
    with quiet_datasets(datasets):
        try:
            yield datasets
        except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
            raise HubError(
                f"{name}: {first_line(error)}: check the name and, if it is private or gated, "
                "run `hf auth login`"
            ) from error
        except OSError as error:
            raise HubError(f"{name} cannot be fetched ({first_line(error)}): {remedy}") from error
        except refusals as error:
            raise OptionError(f"{name}: cannot be read: {first_line(_origin(error))}") from error


def _origin(error: BaseException) -> BaseException:
    """The error that the library had before it called it one of its own, if there is one."""
    return error.__cause__ if error.__cause__ is not None else error
