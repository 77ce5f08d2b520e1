"""Ways to choose which structures stay, as options of `shrink`.

experts            any score of `emp_llm.shrinking.expert_criteria`, by its name
blocks             ``influence``, ``loss``
neurons, kv heads  ``activation-repaired``, ``obs-repaired``, ``activation``, ``magnitude``

Beside them ``random``, the control of each kind. Nothing is repaired but where a name says so.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from emp_llm.comparison.structures_costs import RANDOM
from emp_llm.errors import OptionError
from emp_llm.options import CalibrationOptions, check_choice
from emp_llm.shrink_options import ShrinkOptions, parse_amount
from emp_llm.shrinking.choice import KindName
from emp_llm.shrinking.choosing import checked_criterion

__all__ = ["Ways", "option_name"]

_WIDTHS: Mapping[str, Mapping[str, Any]] = {
    "activation-repaired": {"width_score": "activation", "repair": "obs"},
    "obs-repaired": {"width_score": "obs", "repair": "obs"},
    "activation": {"width_score": "activation", "repair": "none"},
    "magnitude": {"width_score": "magnitude", "repair": "none"},
    RANDOM: {"width_score": RANDOM, "repair": "none"},
}

_FIELDS: Mapping[KindName, Mapping[str, Mapping[str, Any]]] = {
    "blocks": {name: {"block_score": name} for name in ("influence", "loss", RANDOM)},
    "neurons": _WIDTHS,
    "kv heads": _WIDTHS,
}

_WITH_DATA: Mapping[KindName, tuple[str, ...]] = {
    "experts": ("reap", "aimer", "norm"),
    **{kind: tuple(name for name in fields if name != RANDOM) for kind, fields in _FIELDS.items()},
}
_WITHOUT_DATA: Mapping[KindName, tuple[str, ...]] = {
    "experts": ("aimer", "norm"),
    "blocks": (),
    "neurons": ("magnitude",),
    "kv heads": ("magnitude",),
}


@dataclass(frozen=True, kw_only=True)
class Ways:
    """The ways to choose structures of one kind that are compared.

    Attributes:
        kind: What becomes fewer.
        scores: Their names.
        seeds: Of random choices, one for each.
        multiple: As in `ShrinkOptions`.
        calibration: The data; None for none.
    """

    kind: KindName
    scores: Sequence[str]
    seeds: Sequence[int]
    multiple: int
    calibration: CalibrationOptions | None

    @classmethod
    def of(
        cls,
        kind: KindName,
        scores: Sequence[str] | None,
        seeds: Sequence[int],
        multiple: int,
        calibration: CalibrationOptions | None,
    ) -> "Ways":
        """The ways that names ask for; None for all that the data allows.

        Raises:
            OptionError: If a name is not known, or given twice, or there are none at all; or if
                there are data that none of them uses.
        """
        if scores is None:
            scores = (_WITHOUT_DATA if calibration is None else _WITH_DATA)[kind]
            if not scores and not seeds:
                raise OptionError(
                    f"{kind} are ranked by data: give a text to calibrate on (--calibration), or "
                    "random runs"
                )
        elif isinstance(scores, str) or not scores or len(set(scores)) != len(scores):
            raise OptionError(f"scores are {scores!r}; give a list of one or more, each once")
        if RANDOM in scores:
            raise OptionError("scores: random is compared anyway, random_runs says how often")
        by_data = [score for score in scores if _uses_data(kind, score, calibration)]
        if calibration is not None and not by_data:
            raise OptionError(
                f"calibration {calibration.text!r} would not be used by {', '.join(scores)}: leave "
                "it out, or choose other scores"
            )
        return cls(
            kind=kind,
            scores=tuple(scores),
            seeds=tuple(seeds),
            multiple=multiple,
            calibration=calibration,
        )

    def check(self, amount: int | str) -> None:
        """Check an amount, and that there are data for all that needs any.

        Raises:
            OptionError: If it is none that `shrink` would take, or data are missing.
        """
        parse_amount(self.kind, amount)
        for score in (*self.scores, RANDOM):
            self.options(score, amount)

    def all_options(self, amount: int) -> Iterator[tuple[str, list[ShrinkOptions]]]:
        """All ways to keep so many structures: names, and the options of each run."""
        for score in self.scores:
            yield score, [self.options(score, amount)]
        if self.seeds:
            yield RANDOM, [self.options(RANDOM, amount, seed) for seed in self.seeds]

    def options(self, score: str, amount: int | str, seed: int | None = None) -> ShrinkOptions:
        """The options of `shrink` that a way stands for.

        Args:
            score: Its name.
            amount: How many stay, or the share that is removed.
            seed: Of a random choice; None for any other.
        """
        fields = {"score": score} if self.kind == "experts" else _FIELDS[self.kind][score]
        calibration = self.calibration
        if seed is not None:
            calibration = replace(calibration or CalibrationOptions(), seed=seed)
        given: dict[str, Any] = {**fields, option_name(self.kind): amount}
        return ShrinkOptions(multiple=self.multiple, calibration=calibration, **given)


def _uses_data(kind: KindName, score: str, calibration: CalibrationOptions | None) -> bool:
    """Whether a score needs data; its name is checked first.

    Raises:
        OptionError: If it is not known, or needs data and there is none.
    """
    if kind == "experts":
        return "outputs" in checked_criterion(score, calibration).needs
    check_choice("score", score, _WITH_DATA[kind])
    return score not in _WITHOUT_DATA[kind]


def option_name(kind: KindName) -> str:
    """What the amount of a kind is called in `ShrinkOptions`."""
    return kind.replace(" ", "_")
