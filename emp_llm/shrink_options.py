"""The options of shrinking; values are checked when the options are made."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from emp_llm.errors import OptionError
from emp_llm.messages import encodable
from emp_llm.options import CalibrationOptions, check_choice

__all__ = [
    "AUTO",
    "Amount",
    "BlockScore",
    "ShrinkOptions",
    "WidthRepair",
    "WidthScore",
    "parse_amount",
]

AUTO: Final = "auto"
"""The amount that stands for as few as a bound on the loss allows."""

BlockScore = Literal["influence", "loss", "random"]
WidthScore = Literal["activation", "obs", "magnitude", "random"]
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
        blocks: How many decoder blocks stay, or ``"auto"``.
        experts: How many experts stay in each layer that has any (``6``), which share of them is
            removed (``"25%"``, rounded down to whole experts), or ``"auto"``.
        neurons: Which share of each MLP's neurons is removed (``"10%"``), how many stay, or
            ``"auto"``.
        kv_heads: How many key-value heads stay in each layer, with the query heads that read them,
            which share of them is removed, or ``"auto"``.
        multiple: The number of neurons that stay is a multiple of this, 1 or more, the one next to
            what the share leaves.
        max_loss_increase: With ``"auto"``: by how many per cent the loss on the calibration data
            may rise, finite and above 0. As few structures stay as that allows.
        block_score: How blocks are chosen: ``influence``, those that change the directions of
            hidden states the least go (arXiv 2403.03853); ``loss``, one by one the block without
            which the loss rises the least; or ``random``. The first two need data.
        score: How experts are ranked: ``aimer``, ``reap``, ``norm``, ``random``, or your own as
            ``module:Class`` or by the name that `emp_llm.register_expert_criterion` gave it; see
            `emp_llm.shrinking.expert_criteria`.
        width_score: How neurons and key-value heads are ranked: ``activation``, by what they
            contribute to the outputs of what reads them; ``obs``, by how much the error of these
            rises without them when all others adapt (arXiv 2302.04089); ``magnitude``, by the
            weights that read them; or ``random``. The first two need data.
        repair: Whether the matrices that read neurons and heads are fitted to the outputs of the
            dense model: ``obs``, by least squares on data, or ``none``.
        calibration: The data; for ``random`` its seed.

    Raises:
        OptionError: If a value is out of its range, or nothing is to become fewer, or data are
            needed and not given.

    >>> ShrinkOptions(experts="25%").words()
    ['--experts', '25%']
    """

    blocks: int | str | None = None
    experts: int | str | None = None
    neurons: int | str | None = None
    kv_heads: int | str | None = None
    multiple: int = 64
    max_loss_increase: float | None = None
    block_score: BlockScore = "influence"
    score: str = "aimer"
    width_score: WidthScore = "activation"
    repair: WidthRepair = "obs"
    calibration: CalibrationOptions | None = None

    def __post_init__(self) -> None:
        given = self._given()
        if not given:
            raise OptionError(
                "nothing is to become fewer: give blocks, such as 24, experts, such as 6 or '25%', "
                "neurons or key-value heads"
            )
        for name, value in given.items():
            if value != AUTO:
                parse_amount(name, value, AUTO)
        self._check_search([name for name, value in given.items() if value == AUTO])
        self._check_blocks()
        self._check_widths()
        if not isinstance(self.score, str):
            raise OptionError(
                f"score is {self.score!r}; give its name: 'module:Class', or the one that "
                "emp_llm.register_expert_criterion gave it"
            )

    def _given(self) -> dict[str, int | str]:
        """The amounts that are given, by names that are right in Python and on a command line."""
        amounts = {
            "blocks": self.blocks,
            "experts": self.experts,
            "neurons": self.neurons,
            "kv heads": self.kv_heads,
        }
        return {name: value for name, value in amounts.items() if value is not None}

    def _check_blocks(self) -> None:
        check_choice("block score", self.block_score, get_args(BlockScore))
        if self._ranks_blocks_by_data:
            self._check_text(f"block score {self.block_score!r}")

    def _check_search(self, searched: list[str]) -> None:
        """Check that a bound goes with what is searched for, and a search with a bound."""
        most = self.max_loss_increase
        known = isinstance(most, int | float) and math.isfinite(most) and most > 0
        if most is not None and not known:
            raise OptionError(
                f"max loss increase is {most!r}; it is by how many per cent the loss may rise: "
                "give a finite number above 0, such as 5"
            )
        if len(searched) > 1:
            raise OptionError(
                f"{' and '.join(searched)} are all auto, and a bound on the loss does not say what "
                "each may take of it: give the number of all but one"
            )
        if searched and most is None:
            raise OptionError(
                f"{searched[0]} is auto: give the max loss increase too, by how many per cent the "
                "loss on the calibration data may rise, such as 5"
            )
        if most is not None and not searched:
            raise OptionError("max loss increase bounds a search: give an amount as 'auto'")
        if searched:
            self._check_text("auto")

    def _check_text(self, user: str) -> None:
        if self.calibration is None or self.calibration.text is None:
            raise OptionError(
                f"{user} needs data: give a text to calibrate on (--calibration), such as "
                "wikitext2 or a file"
            )

    @property
    def narrows(self) -> bool:
        """Whether neurons or key-value heads are to become fewer."""
        return self.neurons is not None or self.kv_heads is not None

    @property
    def narrows_by_data(self) -> bool:
        """Whether these are chosen or repaired by data."""
        return self.narrows and (self.repair != "none" or self.width_score in ("obs", "activation"))

    @property
    def _ranks_blocks_by_data(self) -> bool:
        return self.blocks is not None and self.block_score != "random"

    @property
    def uses_data(self) -> bool:
        """Whether data are used, whatever ranks experts."""
        searches = self.max_loss_increase is not None
        return searches or self._ranks_blocks_by_data or self.narrows_by_data

    def _check_widths(self) -> None:
        if type(self.multiple) is not int or self.multiple < 1:
            raise OptionError(f"multiple is {self.multiple!r}; give a whole number, 1 or more")
        check_choice("width score", self.width_score, get_args(WidthScore))
        check_choice("repair", self.repair, get_args(WidthRepair))
        if self.narrows_by_data and (self.calibration is None or self.calibration.text is None):
            raise OptionError(
                "neurons and kv heads are chosen and repaired by data: give a text to calibrate on "
                "(--calibration), such as wikitext2 or a file, or width score 'magnitude' and "
                "repair 'none'"
            )

    def words(self) -> list[str]:
        """These options as words of the command line, without those that are as by default."""
        usual = CalibrationOptions()
        data = self.calibration or usual
        text = None if data.text is None else encodable(Path(data.text).name)
        words: list[str] = []
        for option, value, default in (
            ("--blocks", self.blocks, None),
            ("--experts", self.experts, None),
            ("--neurons", self.neurons, None),
            ("--kv-heads", self.kv_heads, None),
            ("--multiple", self.multiple, type(self).multiple),
            ("--max-loss-increase", self.max_loss_increase, None),
            ("--block-score", self.block_score, type(self).block_score),
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


def parse_amount(option: str, value: int | str, other: str | None = None) -> Amount:
    """Read an amount.

    Args:
        option: What the option is called.
        value: A number of structures that stay, or a share that is removed, such as "25%"; blocks
            have no shares.
        other: A word that the option takes as well, for errors.

    Raises:
        OptionError: If it is neither.

    >>> parse_amount("experts", "25%")
    Amount(keep=None, remove=0.25)
    >>> parse_amount("experts", 6)
    Amount(keep=6, remove=None)
    """
    text = str(value).strip()
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(%?)", text)
    if found is not None and not isinstance(value, bool):
        if found[2] and option != "blocks" and 0 < (share := float(found[1]) / 100) < 1:
            return Amount(remove=share)
        if not found[2] and found[1].isdecimal() and int(found[1]) > 0:
            return Amount(keep=int(found[1]))
    raise _no_amount(option, value, other)


def _no_amount(option: str, value: object, other: str | None) -> OptionError:
    ways = ["how many stay, such as 6"]
    if option != "blocks":
        ways.append("the share that is removed, such as '25%'")
    if other is not None:
        ways.append(f"'{other}'")
    *first, last = ways
    return OptionError(
        f"{option} is {value!r}: give {', '.join(first)}{' or ' if first else ''}{last}"
    )
