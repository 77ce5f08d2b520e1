"""Which structures a model has, and which of them stay."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from emp_llm.report.shrink_report import Tried

__all__ = ["WIDTHS", "Choice", "KindName", "Structures", "effective"]

KindName = Literal["blocks", "experts", "neurons", "kv heads"]
"""What can become fewer; the keys of `emp_llm.shrinking.kinds.KINDS`."""


WIDTHS: Final[tuple[KindName, ...]] = ("neurons", "kv heads")
"""What is chosen together, decoder block by decoder block, behind all else; the matrices that read
these may be repaired."""


@dataclass(frozen=True, kw_only=True)
class Structures:
    """The structures of one kind that a model has.

    Attributes:
        kind: What they are.
        number: How many there are in each of `holders`: the same in all, as a config has one field
            for it.
        holders: Names, in the checkpoint, of what holds them: of decoder blocks; for structures
            that are decoder blocks themselves, the name of their list, such as ``model.layers``.
        least: The fewest that may stay.
        groups: Into how many runs of equal length a holder's structures are divided that must stay
            equally long, as DeepSeek routes within groups of experts; 1 if any may go.
        why_least: The field of the config that sets `least`, and its value, for errors.
        field: The field of the config that gives `number`.
    """

    kind: KindName
    number: int
    holders: tuple[str, ...]
    least: int = 1
    groups: int = 1
    why_least: str = ""
    field: str = ""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which structures of one kind stay.

    Whatever ranks or searches makes one of these; all that follows is the same for each kind.

    Attributes:
        kind: What they are.
        kept: For each holder, see `Structures.holders`, the numbers of those that stay, ascending;
            as many in each holder.
        score: What `scores` are: the name of a ranking, or "given".
        scores: The score of each structure, for each holder; empty where none were computed.
        tried: What was tried to find it, in order.
    """

    kind: KindName
    kept: Mapping[str, tuple[int, ...]]
    score: str = "given"
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    tried: Sequence[Tried] = ()

    @property
    def number(self) -> int:
        """How many stay in each holder."""
        return len(next(iter(self.kept.values())))

    def to_dict(self) -> dict[str, Any]:
        """The choice as JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Choice":
        """The choice that `to_dict` gave these fields of, read from JSON."""
        kept, scores = (
            {holder: tuple(values) for holder, values in fields[name].items()}
            for name in ("kept", "scores")
        )
        score, tried = fields["score"], tuple(fields["tried"])
        return cls(kind=fields["kind"], kept=kept, score=score, scores=scores, tried=tried)


def effective(scores: tuple[float, ...]) -> float:
    """The effective number (Σs)² / Σs² of a few scores; 0 where all are zero.

    >>> effective((1.0, 1.0, 2.0))
    2.6666666666666665
    """
    squares = sum(score * score for score in scores)
    return sum(scores) ** 2 / squares if squares else 0.0
