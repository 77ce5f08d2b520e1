"""What a kind of structures has to say of itself: in the config, and in the shapes of parameters.

Everything else follows from the model that transformers builds with one number of structures and
with another: which tensors change, in which dimension, and what the result must look like.

A new kind is a class of `Kind` in a file of its own, entered in `emp_llm.shrinking.kinds`, with its
name in `emp_llm.shrinking.choice.KindName`. What ranks or searches then only makes a `Choice`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from emp_llm.shrinking.choice import KindName
from emp_llm.shrinking.config_fields import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Amounts", "Kind", "Resized"]


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How many structures of a kind a config says there are, and may be.

    Attributes:
        number: How many there are now in each holder.
        least: The fewest that may stay.
        groups: As `emp_llm.shrinking.choice.Structures.groups`.
        why_least: The field that sets `least` and its value, such as "num_experts_per_tok 2".
        field: The name of the field that gives `number`.
    """

    number: int
    least: int = 1
    groups: int = 1
    why_least: str = ""
    field: str = ""


@dataclass(frozen=True, kw_only=True)
class Resized:
    """A dimension of a parameter that differs between models with more and with fewer structures.

    Attributes:
        model: The model with all structures, on the meta device.
        name: The parameter's name in it.
        dimension: Which dimension.
        before: Its size with `number` structures.
        after: Its size with `fewer`.
        number: How many structures there are.
        fewer: How many the other model has.
    """

    model: "PreTrainedModel"
    name: str
    dimension: int
    before: int
    after: int
    number: int
    fewer: int


class Kind(ABC):
    """One kind of structures.

    Attributes:
        name: What it is called in options and reports.
    """

    name: ClassVar[KindName]

    @abstractmethod
    def amounts(self, config: ModelConfig) -> Amounts:
        """How many there are.

        Raises:
            CheckpointError: If the config has none, or does not say it in one field.
        """

    @abstractmethod
    def resized(self, config: ModelConfig, kept: Sequence[int]) -> dict[str, Any]:
        """The content of config.json with only some of the structures.

        Args:
            config: The model's.
            kept: The numbers of those that stay, ascending. Most kinds only count them; of decoder
                blocks, lists with an item for each follow.
        """

    def compared(self, amounts: Amounts) -> int:
        """With how many the model is built as well, to see what depends on their number.

        By default one fewer in each group.
        """
        return amounts.number - amounts.groups

    def obstacle(self, full: "PreTrainedModel", reduced: "PreTrainedModel") -> str | None:
        """Why structures of a model cannot become fewer without a change in those that stay.

        Args:
            full: The model with all of them, on the meta device.
            reduced: The same with fewer.

        Returns:
            What to tell the user; None, as by default, if they can.
        """
        del full, reduced
        return None

    def widths(self, resized: Resized) -> tuple[int, ...] | None:
        """How a dimension is made of structures: in segments, each of `number` runs in order.

        By default the dimension is one segment.

        Returns:
            The length of a structure's run in each segment: ``(1,)`` for rows of a router, one for
            each expert; ``(64,)`` for key heads of 64 dimensions one behind the other; ``(1, 1)``
            for neurons of a gate followed by those of its up projection, ``(2,)`` for the same
            interleaved. None if the sizes cannot be explained.
        """
        width, rest = divmod(resized.before, resized.number)
        return None if rest or width * resized.fewer != resized.after else (width,)
