"""What a user can ask of a calibration, checked once, where it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from emp_llm.errors import OptionError

if TYPE_CHECKING:
    from emp_llm.options import PruneOptions

__all__ = ["CalibrationOptions", "needs_decisions"]

_MOST_SAMPLES = 1 << 16


def needs_decisions(options: PruneOptions) -> bool:
    """Whether masks or weights come from more than the magnitudes, and are decided on ahead."""
    return options.criterion != "magnitude" or options.repair != "none"


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """The data that scores are taken from, and how the model meets it.

    Args:
        text: ``wikitext2``, ``ptb``, ``c4``, a file, or a data set of the Hub; None where only the
            seed is needed.
        samples: How many samples of it, from 1 to 65,536.
        length: Tokens in a sample, 2 or more; by default 2,048, or the model's positions if those
            are fewer.
        seed: Of the places that samples are taken from, and of the criterion ``random``.
        sequential: Whether a block gets what the pruned blocks before it give, rather than what
            the dense ones do.
        device: Where blocks are computed: ``auto`` (the first GPU if there is one), ``cpu``,
            ``cuda`` or ``cuda:N``.
        activation_memory: Bytes of activations that wait in memory; further ones wait on disk.

    Raises:
        OptionError: If a value is out of its range.
    """

    text: str | None = None
    samples: int = 128
    length: int | None = None
    seed: int = 0
    sequential: bool = True
    device: str = "auto"
    activation_memory: int = 8 << 30

    def __post_init__(self) -> None:
        for name, value, least in (
            ("samples", self.samples, 1),
            ("length", 2 if self.length is None else self.length, 2),
            ("seed", self.seed, 0),
            ("activation_memory", self.activation_memory, 0),
        ):
            if type(value) is not int or value < least:
                raise OptionError(
                    f"calibration: {name} is {value!r}; give a whole number, {least} or more"
                )
        if self.samples > _MOST_SAMPLES:
            raise OptionError(
                f"calibration: samples is {self.samples}; each one waits in a thread of its own: "
                f"give {_MOST_SAMPLES} or fewer, and a larger length for more tokens"
            )
