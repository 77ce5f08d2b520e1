"""The results of a comparison of scores of experts: the perplexity with fewer of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from emp_llm.comparison.costs import Measured, runs_of
from emp_llm.report.source_fields import SourceFields

__all__ = ["DENSE", "RANDOM", "ExpertsComparison", "ExpertsCost"]

DENSE, RANDOM = "dense", "random"


@dataclass(frozen=True, kw_only=True)
class ExpertsCost(Measured):
    """What it costs to keep the experts that a score ranks highest.

    Attributes:
        score: The name of the score; ``dense`` for the model as it is.
        experts: How many experts stay in each layer.
        weights: Weights of the whole model that stay.
    """

    score: str
    experts: int
    weights: int

    @property
    def key(self) -> tuple[str, int]:
        """What no other row of a comparison has."""
        return self.score, self.experts

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ExpertsCost":
        """The cost that `to_dict` gave these fields of."""
        names = ("score", "experts", "weights")
        return cls(runs=runs_of(fields), **{name: fields[name] for name in names})

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return {
            "score": self.score,
            "experts": self.experts,
            "weights": self.weights,
            "perplexity": self.perplexity,
            "deviation": self.deviation,
            "runs": [asdict(run) for run in self.runs],
        }


@dataclass(frozen=True, kw_only=True)
class ExpertsComparison:
    """What `emp_llm.compare_experts` found.

    Attributes:
        source: Name and revision of the model.
        settings: The options that were given.
        costs: The dense model's first, then for each number of experts those of all scores.
        taken: How many of the costs were not measured now, but by an earlier run that was saved.
    """

    source: SourceFields
    settings: Mapping[str, Any]
    costs: Sequence[ExpertsCost]
    taken: int = 0

    @property
    def dense(self) -> ExpertsCost:
        """The model as it is."""
        return self.costs[0]

    def random(self, experts: int) -> ExpertsCost | None:
        """As many experts at random; None if that was left out."""
        of_random = (c for c in self.costs if c.key == (RANDOM, experts))
        return next(of_random, None)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it, with each cost relative to the dense model."""
        return {
            "source": self.source,
            "settings": dict(self.settings),
            "results": [
                cost.to_dict() | {"above_dense": cost.above(self.dense)} for cost in self.costs
            ],
        }
