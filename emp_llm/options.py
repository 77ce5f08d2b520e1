"""What a user can ask of a pruning, checked once, where it is made."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from emp_llm.errors import OptionError

__all__ = [
    "CalibrationOptions",
    "CountBy",
    "Granularity",
    "OutputFormat",
    "PruneOptions",
    "Repair",
    "counts_magnitudes",
    "needs_masks",
]


Granularity = Literal["row", "layer", "model"]
OutputFormat = Literal["packed", "dense"]
CountBy = Literal["criterion", "magnitude"]
Repair = Literal["none", "obs", "bias"]

_MOST_SAMPLES = 1 << 16


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


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """The rule's options, and what is written.

    Args:
        beta: Multiplier of the effective number; finite and positive. 1.0 is the paper's rule.
            Where `target_sparsity` or `max_loss_increase` is given it is found instead.
        granularity: What one group of scores is: ``row`` (all inputs of one output neuron),
            ``layer`` (one weight matrix) or ``model`` (all target matrices together).
        targets: ``mlp``, ``attention``, ``all-linear``, or a regular expression searched in
            checkpoint tensor names.
        ignore: Regular expressions; a target whose checkpoint name one of them is found in is
            left as it is. Patterns are Python's: one that repeats a repeat, such as ``(a+)+$``, can
            take without end on a name.
        output_format: ``packed`` (smaller, exact) or ``dense`` (an ordinary checkpoint with
            zeros in it).
        criterion: What weights are ranked by: a name of `emp_llm.calibration.criteria`, or
            ``module:Class`` of one's own.
        count_by: Whose effective number says how many weights stay: the criterion's scores', or
            the magnitudes'.
        repair: What is changed to restore the outputs of pruned layers: ``none``, ``obs`` (the
            kept weights) or ``bias`` (the biases).
        target_sparsity: Share of the targets' weights to prune, from 0 to 1; the β is found.
        max_loss_increase: By what share, in per cent, the loss on the calibration data may rise at
            most; the β is found.
        calibration: The data, for what needs any.

    Raises:
        OptionError: If a value is out of its range or a regular expression does not compile.
    """

    beta: float = 1.0
    granularity: Granularity = "row"
    targets: str = "mlp"
    ignore: tuple[str, ...] = ()
    output_format: OutputFormat = "packed"
    criterion: str = "magnitude"
    count_by: CountBy = "criterion"
    repair: Repair = "none"
    target_sparsity: float | None = None
    max_loss_increase: float | None = None
    calibration: CalibrationOptions | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.beta, int | float)
        if not (number and math.isfinite(self.beta) and self.beta > 0):
            raise OptionError(
                f"beta is {self.beta}; it multiplies the number of weights to keep: "
                "give a finite number above 0, such as 1.0"
            )
        if not isinstance(self.criterion, str):
            raise OptionError(
                f"criterion is {self.criterion!r}; give its name: 'module:Class', or that by which "
                "emp_llm.register_criterion made it known"
            )
        sparsity = self.target_sparsity
        if sparsity is not None and not 0 < sparsity < 1:
            raise OptionError(
                f"target_sparsity is {sparsity}; it is the share of weights to prune: give a "
                "number between 0 and 1, such as 0.5"
            )
        increase = self.max_loss_increase
        if increase is not None and not (math.isfinite(increase) and increase > 0):
            raise OptionError(
                f"max_loss_increase is {increase}; it is by how many per cent the loss may rise: "
                "give a finite number above 0, such as 1"
            )
        if sparsity is not None and increase is not None:
            raise OptionError(
                "target_sparsity and max_loss_increase are two ways to find one β: give one of them"
            )
        _check_choice("granularity", self.granularity, get_args(Granularity))
        _check_choice("format", self.output_format, get_args(OutputFormat))
        _check_choice("count-by", self.count_by, get_args(CountBy))
        _check_choice("repair", self.repair, get_args(Repair))
        for option, pattern in (("targets", self.targets), *(("ignore", p) for p in self.ignore)):
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise OptionError(
                    f"{option} {pattern!r} is not a regular expression: {error}"
                ) from error


def counts_magnitudes(options: PruneOptions) -> bool:
    """Whether the weights alone say how many of them stay."""
    return "magnitude" in (options.criterion, options.count_by)


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"{option} is {value!r}; choose one of {', '.join(choices)}")


def needs_masks(options: PruneOptions) -> bool:
    """Whether masks or weights come from more than the magnitudes, and are decided on ahead."""
    return options.criterion != "magnitude" or options.repair != "none"
