"""Who hears of a text while it is generated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from emp_llm.generation.results import Weights

__all__ = ["Deaf", "Listener"]


class Listener(Protocol):
    """Hears the text of each model as it is generated."""

    def begin(self, model: str, weights: Weights) -> None:
        """The text of a model begins.

        Args:
            model: Its Hub id or folder.
            weights: How its weights lie in memory.
        """

    def hear(self, text: str) -> None:
        """More of the text; a word or a few."""

    def end(self) -> None:
        """The text has ended."""


class Deaf:
    """A listener that does nothing."""

    def begin(self, model: str, weights: Weights) -> None:
        """Do nothing."""

    def hear(self, text: str) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""
