"""The options of pruning and calibration; values are checked when the options are made."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, get_args

from emp_llm.errors import OptionError
from emp_llm.messages import encodable

__all__ = [
    "NO_TARGETS",
    "PRESETS",
    "Allocate",
    "CalibrationOptions",
    "CountBy",
    "Granularity",
    "OutputFormat",
    "Preset",
    "PruneOptions",
    "Repair",
    "Rest",
    "check_choice",
    "counts_magnitudes",
    "needs_masks",
    "packs_rest",
    "patterns",
    "ranks_magnitudes",
]


Granularity = Literal["row", "layer", "model"]
OutputFormat = Literal["packed", "dense"]
Allocate = Literal["emp", "uniform", "loss"]
CountBy = Literal["criterion", "magnitude"]
Repair = Literal["none", "obs", "swaps", "bias"]
Rest = Literal["packed", "plain"]
Preset = Literal["paper", "repaired", "best"]

NO_TARGETS: Final = "none"
"""The `targets` with which nothing is pruned: what `emp_llm.pack` does."""

PRESETS: Final[Mapping[Preset, Mapping[str, Any]]] = {
    "paper": {},
    "repaired": {"criterion": "obs", "count_by": "magnitude", "repair": "obs"},
    "best": {"criterion": "obs", "count_by": "magnitude", "repair": "swaps", "recover": 100},
}
"""The options that docs/quality.md proves best together: without data, by a calibration, and with a
short training after it."""

_MOST_SAMPLES = 1 << 16
_MOST_STEPS = 1 << 15


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """The data that scores are taken from, and how the model is run on it.

    Args:
        text: ``wikitext2``, ``ptb``, ``c4``, a file, or a data set of the Hub; None where only the
            seed is needed.
        samples: How many samples to take from it, from 1 to 65,536.
        length: Tokens in a sample, 2 or more; by default 2,048, or the positions that the model
            has if those are fewer.
        seed: Seed of the places that samples are taken from, and of the criterion ``random``; 0 or
            more.
        sequential: Whether the input of a decoder block is the output of the pruned blocks before
            it, rather than of the dense ones.
        device: Where decoder blocks are computed: ``auto`` (the first GPU if there is one),
            ``cpu``, ``cuda`` or ``cuda:N``.
        activation_memory: Bytes of activations to hold in memory, 0 or more; further ones are
            written to disk until they are needed.
        trust_remote_code: Whether code that comes with the tokenizer may be run. The model is
            transformers' own in any case.

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
    trust_remote_code: bool = False

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
                f"calibration: samples is {self.samples}, and each one needs a thread of its own: "
                f"give {_MOST_SAMPLES} or fewer, and a larger length for more tokens"
            )


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    r"""What is pruned, how many weights stay, which ones, and what is written.

    Args:
        beta: Multiplier of the effective number, finite and above 0; 1.0 is the paper's rule.
            Where `target_sparsity` or `max_loss_increase` is given, β is found instead.
        target_sparsity: Share of the targets' weights to prune, above 0 and below 1; the β that
            prunes so many is found.
        max_loss_increase: By how many per cent the loss on the calibration data may rise at most,
            finite and above 0; the smallest β that keeps to it is searched for.
        granularity: Which weights are ranked together: those of a ``row`` (all inputs of one output
            neuron), of a ``layer`` (one weight matrix) or of the ``model`` (all targets).
        allocate: How the weights that stay are spread over targets: as the effective numbers of
            groups say (``emp``); the same share of each group (``uniform``); or with a β for each
            target, so that the loss on the data rises the least (``loss``). All three keep as many
            weights together, and the last two need N_eff of magnitudes, and granularity ``row`` or
            ``layer``.
        targets: Which tensors are pruned: ``mlp``, ``attention``, ``all-linear``, ``none``, or a
            regular expression searched in the checkpoint's tensor names.
        ignore: Regular expressions; a target is left as it is if one of them is found in its name
            in the checkpoint. A single string is one expression. Patterns are Python's: one that
            repeats a repeat, such as ``(a+)+$``, can take forever on a name.
        criterion: How weights are ranked: a name of `emp_llm.calibration.criteria`, or a class of
            your own as ``module:Class``.
        count_by: What the effective number, which sets how many weights stay, is computed from:
            the scores of the ``criterion``, or the weights' ``magnitude``.
        repair: What is changed to restore the outputs of pruned layers: ``none``, ``obs`` (the
            kept weights), ``swaps`` (these, and which ones of a row are kept) or ``bias`` (the
            biases).
        recover: For how many steps the pruned model is trained towards the logits of the dense
            one, on samples of the data, 0 to 32,768: the kept weights, norms and biases. The whole
            model has to fit in memory.
        calibration: The data, for a criterion, repair, recovery or search that needs any.
        output_format: ``packed`` (smaller, exact) or ``dense`` (an ordinary checkpoint with
            zeros in it).
        rest: What becomes of the tensors that are not pruned where the others are packed:
            ``packed`` (all bits of those of 64 KiB and more, in fewer bytes) or ``plain``. In a
            dense checkpoint they are plain in any case.

    Raises:
        OptionError: If a value is out of its range or a regular expression does not compile.

    >>> options = PruneOptions(beta=0.8, ignore=(r"layers\.(0|31)\.",))
    >>> options.granularity, options.targets, options.criterion
    ('row', 'mlp', 'magnitude')
    """

    beta: float = 1.0
    target_sparsity: float | None = None
    max_loss_increase: float | None = None
    granularity: Granularity = "row"
    allocate: Allocate = "emp"
    targets: str = "mlp"
    ignore: tuple[str, ...] = ()
    criterion: str = "magnitude"
    count_by: CountBy = "criterion"
    repair: Repair = "none"
    recover: int = 0
    calibration: CalibrationOptions | None = None
    output_format: OutputFormat = "packed"
    rest: Rest = "packed"

    def __post_init__(self) -> None:
        _check_beta(self.beta)
        if not isinstance(self.criterion, str):
            raise OptionError(
                f"criterion is {self.criterion!r}; give its name: 'module:Class', or the one that "
                "emp_llm.register_criterion gave it"
            )
        _check_search(self.target_sparsity, self.max_loss_increase)
        check_choice("granularity", self.granularity, get_args(Granularity))
        check_choice("allocate", self.allocate, get_args(Allocate))
        check_choice("format", self.output_format, get_args(OutputFormat))
        check_choice("rest", self.rest, get_args(Rest))
        check_choice("count-by", self.count_by, get_args(CountBy))
        check_choice("repair", self.repair, get_args(Repair))
        _check_steps(self.recover)
        _checked_pattern("targets", self.targets)
        object.__setattr__(self, "ignore", patterns("ignore", self.ignore))  # the class is frozen
        self._check_lossless()

    @classmethod
    def preset(cls, name: Preset, **options: object) -> Self:
        """The options that are known to work best together, at three levels of effort.

        Args:
            name: ``paper`` (magnitudes alone, no data), ``repaired`` (scores and repair from data)
                or ``best`` (and a short training after it).
            **options: Others, and those to change.

        Raises:
            OptionError: If there is no such preset, or as when options are made.

        >>> options = PruneOptions.preset("repaired", beta=0.8)
        >>> options.criterion, options.count_by, options.repair, options.beta
        ('obs', 'magnitude', 'obs', 0.8)
        """
        check_choice("preset", name, get_args(Preset))
        fields: dict[str, Any] = {**PRESETS[name], **options}
        return cls(**fields)

    def _check_lossless(self) -> None:
        """Check that nothing is asked for that only pruning does, where nothing is pruned."""
        if self.targets != NO_TARGETS:
            return
        for name in (
            *("beta", "target_sparsity", "max_loss_increase", "granularity", "ignore"),
            *("allocate", "criterion", "count_by", "repair", "recover", "rest"),
        ):
            value, usual = getattr(self, name), getattr(type(self), name)
            if value != usual:
                raise OptionError(
                    f"{name} is {value!r}, but targets is {NO_TARGETS!r}, with which nothing is "
                    "pruned and the rest is packed: leave one of them out"
                )


def patterns(option: str, value: object) -> tuple[str, ...]:
    r"""Check an option that takes regular expressions; a single string is one of them.

    Args:
        option: What the option is called.
        value: One regular expression, or several.

    Raises:
        OptionError: If it is anything else.

    >>> patterns("ignore", "down_proj")
    ('down_proj',)
    """
    # the items of a string are its letters, which would match nearly every name
    if isinstance(value, str) or not isinstance(value, Iterable):
        return (_checked_pattern(option, value),)
    return tuple(_checked_pattern(option, pattern) for pattern in value)


def counts_magnitudes(options: PruneOptions) -> bool:
    """Whether the effective number is that of magnitudes, so that it is known without data."""
    return "magnitude" in (options.criterion, options.count_by)


def ranks_magnitudes(options: PruneOptions) -> bool:
    """Whether the rule on magnitudes alone gives the masks."""
    of_rule = options.repair != "swaps" and options.allocate == "emp"
    return options.criterion == "magnitude" and of_rule


def needs_masks(options: PruneOptions) -> bool:
    """Whether masks or weights depend on more than magnitudes, so that they are found first."""
    return (
        options.criterion != "magnitude"
        or options.repair != "none"
        or options.recover > 0
        or options.allocate != "emp"
    )


def packs_rest(options: PruneOptions) -> bool:
    """Whether tensors that are not pruned are packed too."""
    return options.output_format == "packed" and options.rest == "packed"


def _check_beta(beta: object) -> None:
    if not isinstance(beta, int | float) or not (math.isfinite(beta) and beta > 0):
        raise OptionError(
            f"beta is {beta}; it multiplies the number of weights to keep: "
            "give a finite number above 0, such as 1.0"
        )


def _check_steps(steps: object) -> None:
    if type(steps) is not int or not 0 <= steps <= _MOST_STEPS:
        raise OptionError(
            f"recover is {steps!r}; it is for how many steps to train: give a whole number from 0 "
            f"to {_MOST_STEPS}"
        )


def _check_search(sparsity: float | None, increase: float | None) -> None:
    """Check what β is to be found by."""
    if sparsity is not None and not 0 < sparsity < 1:
        raise OptionError(
            f"target_sparsity is {sparsity}; it is the share of weights to prune: give a "
            "number between 0 and 1, such as 0.5"
        )
    if increase is not None and not (math.isfinite(increase) and increase > 0):
        raise OptionError(
            f"max_loss_increase is {increase}; it is by how many per cent the loss may rise: "
            "give a finite number above 0, such as 1"
        )
    if sparsity is not None and increase is not None:
        raise OptionError(
            "target_sparsity and max_loss_increase are two ways to find one β: give one of them"
        )


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Check that the value of an option is one of those there are.

    Raises:
        OptionError: If it is not.
    """
    if value not in choices:
        raise OptionError(f"{option} is {value!r}; choose one of {', '.join(choices)}")


def _checked_pattern(option: str, pattern: object) -> str:
    if not isinstance(pattern, str):
        raise OptionError(f"{option} is {pattern!r:.120}; give a regular expression as a string")
    if encodable(pattern) != pattern:
        raise OptionError(f"{option} {pattern!r} is not UTF-8, as the names of all tensors are")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise OptionError(f"{option} {pattern!r} is not a regular expression: {error}") from error
    return pattern
