"""The options of shrinking; values are checked when the options are made."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from emp_llm.errors import OptionError
from emp_llm.messages import encodable
from emp_llm.options import CalibrationOptions

__all__ = ["Amount", "ShrinkOptions", "parse_amount"]


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
        score: How experts are ranked: ``aimer``, ``reap``, ``norm``, ``random``, or your own as
            ``module:Class`` or by the name that `emp_llm.register_expert_criterion` gave it; see
            `emp_llm.shrinking.expert_criteria`.
        calibration: The data, for scores that need it; for ``random`` its seed.

    Raises:
        OptionError: If a value is out of its range, or nothing is to become fewer.

    >>> ShrinkOptions(experts="25%").words()
    ['--experts', '25%']
    """

    experts: int | str | None = None
    score: str = "aimer"
    calibration: CalibrationOptions | None = None

    def __post_init__(self) -> None:
        if self.experts is None:
            raise OptionError("nothing is to become fewer: give experts, such as 6 or '25%'")
        parse_amount("experts", self.experts)
        if not isinstance(self.score, str):
            raise OptionError(
                f"score is {self.score!r}; give its name: 'module:Class', or the one that "
                "emp_llm.register_expert_criterion gave it"
            )

    def words(self) -> list[str]:
        """These options as words of the command line, without those that are as by default."""
        usual = CalibrationOptions()
        data = self.calibration or usual
        text = None if data.text is None else encodable(Path(data.text).name)
        words: list[str] = []
        for option, value, default in (
            ("--experts", self.experts, None),
            ("--score", self.score, type(self).score),
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
