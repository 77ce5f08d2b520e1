"""What a user can ask of a pruning, checked once, where it is made."""

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from emp_llm.errors import OptionError

__all__ = ["Granularity", "OutputFormat", "PruneOptions"]

Granularity = Literal["row", "layer", "model"]
OutputFormat = Literal["packed", "dense"]


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """The rule's options, and what is written.

    Args:
        beta: Multiplier of the effective number; finite and positive. 1.0 is the paper's rule.
        granularity: What one group of scores is: ``row`` (all inputs of one output neuron),
            ``layer`` (one weight matrix) or ``model`` (all target matrices together).
        targets: ``mlp``, ``attention``, ``all-linear``, or a regular expression searched in
            checkpoint tensor names.
        ignore: Regular expressions; a target whose checkpoint name one of them is found in is
            left as it is. Patterns are Python's: one that repeats a repeat, such as ``(a+)+$``, can
            take without end on a name.
        output_format: ``packed`` (smaller, exact) or ``dense`` (an ordinary checkpoint with
            zeros in it).

    Raises:
        OptionError: If a value is out of its range or a regular expression does not compile.
    """

    beta: float = 1.0
    granularity: Granularity = "row"
    targets: str = "mlp"
    ignore: tuple[str, ...] = ()
    output_format: OutputFormat = "packed"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise OptionError(
                f"beta is {self.beta}; it multiplies the number of weights to keep: "
                "give a finite number above 0, such as 1.0"
            )
        _check_choice("granularity", self.granularity, get_args(Granularity))
        _check_choice("format", self.output_format, get_args(OutputFormat))
        for option, pattern in (("targets", self.targets), *(("ignore", p) for p in self.ignore)):
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise OptionError(
                    f"{option} {pattern!r} is not a regular expression: {error}"
                ) from error


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"{option} is {value!r}; choose one of {', '.join(choices)}")
