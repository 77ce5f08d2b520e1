"""The options of shrinking; values are checked when the options are made."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from emp_llm.errors import OptionError
from emp_llm.messages import encodable
from emp_llm.options import CalibrationOptions, check_choice

__all__ = ["Amount", "ShrinkOptions", "WidthRepair", "WidthScore", "parse_amount"]

WidthScore = Literal["obs", "activation", "magnitude", "random"]
WidthRepair = Literal["obs", "none"]


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How many structures stay: one of the two is given.

    Attributes:
        keep: So many.
        remove: All but this share, above 0 and below 1.
    """

    keep: int | None = None
    remove: float | None = None


@dataclass(frozen=True, kw_only=True)
class ShrinkOptions:
    """What becomes fewer, and by what it is chosen.

    Args:
        experts: How many experts stay in each layer that has any (``6``), or which share of them is
            removed (``"25%"``, rounded down to whole experts).
        neurons: Which share of each MLP's neurons is removed (``"10%"``), or how many stay.
        kv_heads: How many key-value heads stay in each layer, with the query heads that read them,
            or which share of them is removed.
        multiple: The number of neurons that stay is a multiple of this, 1 or more, the one next to
            what the share leaves.
        score: How experts are ranked: ``aimer``, ``reap``, ``norm``, ``random``, or your own as
            ``module:Class`` or by the name that `emp_llm.register_expert_criterion` gave it; see
            `emp_llm.shrinking.expert_criteria`.
        width_score: How neurons and key-value heads are ranked: ``obs``, by how much the error of
            what reads them rises without them when all others adapt (arXiv 2302.04089);
            ``activation``, by what they contribute to the outputs; ``magnitude``, by the weights
            that read them; or ``random``. The first two need data.
        repair: Whether the matrices that read neurons and heads are fitted to the outputs of the
            dense model: ``obs``, by least squares on data, or ``none``.
        calibration: The data; for ``random`` its seed.

    Raises:
        OptionError: If a value is out of its range, or nothing is to become fewer, or data are
            needed and not given.

    >>> ShrinkOptions(experts="25%").words()
    ['--experts', '25%']
    """

    experts: int | str | None = None
    neurons: int | str | None = None
    kv_heads: int | str | None = None
    multiple: int = 64
    score: str = "aimer"
    width_score: WidthScore = "obs"
    repair: WidthRepair = "obs"
    calibration: CalibrationOptions | None = None

    def __post_init__(self) -> None:
        amounts = {"experts": self.experts, "neurons": self.neurons, "kv_heads": self.kv_heads}
        given = {name: value for name, value in amounts.items() if value is not None}
        if not given:
            raise OptionError(
                "nothing is to become fewer: give experts, such as 6 or '25%', neurons or kv_heads"
            )
        for name, value in given.items():
            parse_amount(name, value)
        self._check_widths()
        if not isinstance(self.score, str):
            raise OptionError(
                f"score is {self.score!r}; give its name: 'module:Class', or the one that "
                "emp_llm.register_expert_criterion gave it"
            )

    @property
    def narrows(self) -> bool:
        """Whether neurons or key-value heads are to become fewer."""
        return self.neurons is not None or self.kv_heads is not None

    @property
    def narrows_by_data(self) -> bool:
        """Whether these are chosen or repaired by data."""
        return self.narrows and (self.repair != "none" or self.width_score in ("obs", "activation"))

    def _check_widths(self) -> None:
        if type(self.multiple) is not int or self.multiple < 1:
            raise OptionError(f"multiple is {self.multiple!r}; give a whole number, 1 or more")
        check_choice("width_score", self.width_score, get_args(WidthScore))
        check_choice("repair", self.repair, get_args(WidthRepair))
        if self.narrows_by_data and (self.calibration is None or self.calibration.text is None):
            raise OptionError(
                "neurons and kv_heads are chosen and repaired by data: give a text to calibrate "
                "on, such as wikitext2 or a file, or width_score 'magnitude' and repair 'none'"
            )

    def words(self) -> list[str]:
        """These options as words of the command line, without those that are as by default."""
        usual = CalibrationOptions()
        data = self.calibration or usual
        text = None if data.text is None else encodable(Path(data.text).name)
        words: list[str] = []
        for option, value, default in (
            ("--experts", self.experts, None),
            ("--neurons", self.neurons, None),
            ("--kv-heads", self.kv_heads, None),
            ("--multiple", self.multiple, type(self).multiple),
            ("--score", self.score, type(self).score),
            ("--width-score", self.width_score, type(self).width_score),
            ("--repair", self.repair, type(self).repair),
            ("--calibration", text, None),
            ("--samples", data.samples, usual.samples),
            ("--length", data.length, usual.length),
            ("--seed", data.seed, usual.seed),
        ):
            if value not in (default, None):
                words += [option, str(value)]
        return words


def parse_amount(option: str, value: int | str) -> Amount:
    """Read an amount.

    Args:
        option: What the option is called.
        value: A number of structures that stay, or a share that is removed, such as "25%".

    Raises:
        OptionError: If it is neither.

    >>> parse_amount("experts", "25%")
    Amount(keep=None, remove=0.25)
    >>> parse_amount("experts", 6)
    Amount(keep=6, remove=None)
    """
    text = str(value).strip()
    if isinstance(value, bool) or not (found := re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(%?)", text)):
        raise _no_amount(option, value)
    if found[2]:
        share = float(found[1]) / 100
        if not 0 < share < 1:
            raise _no_amount(option, value)
        return Amount(remove=share)
    if not found[1].isdecimal() or int(found[1]) == 0:
        raise _no_amount(option, value)
    return Amount(keep=int(found[1]))


def _no_amount(option: str, value: object) -> OptionError:
    return OptionError(
        f"{option} is {value!r}: give how many stay in each layer, such as 6, or the share that is "
        "removed, such as '25%'"
    )
