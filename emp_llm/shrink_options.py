"""The options of shrinking; values are checked when the options are made."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from emp_llm.errors import OptionError

__all__ = ["Amount", "ExpertScore", "ShrinkOptions", "parse_amount"]

ExpertScore = Literal["aimer"]


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
        score: How experts are ranked: ``aimer``, mean |w| / rms(w) over an expert's matrices, which
            is √(N_eff / N); the experts with the lowest stay (arXiv 2603.18492). It needs no data.

    Raises:
        OptionError: If a value is out of its range, or nothing is to become fewer.

    >>> ShrinkOptions(experts="25%").words()
    ['--experts', '25%']
    """

    experts: int | str | None = None
    score: ExpertScore = "aimer"

    def __post_init__(self) -> None:
        if self.experts is None:
            raise OptionError("nothing is to become fewer: give experts, such as 6 or '25%'")
        parse_amount("experts", self.experts)
        if self.score not in get_args(ExpertScore):
            raise OptionError(
                f"score is {self.score!r}; choose one of {', '.join(get_args(ExpertScore))}"
            )

    def words(self) -> list[str]:
        """These options as words of the command line, without those that are as by default."""
        words = [] if self.experts is None else ["--experts", str(self.experts)]
        return words if self.score == type(self).score else [*words, "--score", self.score]


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
