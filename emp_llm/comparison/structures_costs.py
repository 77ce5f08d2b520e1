"""The results of a comparison of smaller models: the perplexity with fewer structures of a kind."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from emp_llm.comparison.costs import Measured, runs_of
from emp_llm.report.source_fields import SourceFields
from emp_llm.shrinking.choice import KindName

__all__ = ["DENSE", "RANDOM", "StructuresComparison", "StructuresCost"]

DENSE, RANDOM = "dense", "random"


@dataclass(frozen=True, kw_only=True)
class StructuresCost(Measured):
    """What it costs to keep the structures that a score ranks highest.

    Attributes:
        score: How they were chosen, see `emp_llm.comparison.ways`; ``dense`` for the model as it
            is.
        kept: How many stay: of blocks in the model, of other kinds in each layer.
        weights: Weights of the whole model that stay; of several runs, in the first.
    """

    score: str
    kept: int
    weights: int

    @property
    def key(self) -> tuple[str, int]:
        """What no other row of a comparison has."""
        return self.score, self.kept

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "StructuresCost":
        """The cost that `to_dict` gave these fields of."""
        names = ("score", "kept", "weights")
        return cls(runs=runs_of(fields), **{name: fields[name] for name in names})

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return {
            "score": self.score,
            "kept": self.kept,
            "weights": self.weights,
            "perplexity": self.perplexity,
            "deviation": self.deviation,
            "runs": [asdict(run) for run in self.runs],
        }


@dataclass(frozen=True, kw_only=True)
class StructuresComparison:
    """What `emp_llm.compare_structures` found.

    Attributes:
        source: Name and revision of the model.
        kind: What became fewer.
        settings: The options that were given.
        costs: The dense model's first, then for each number of structures those of all scores.
        taken: How many of the costs were not measured now, but by an earlier run that was saved.
    """

    source: SourceFields
    kind: KindName
    settings: Mapping[str, Any]
    costs: Sequence[StructuresCost]
    taken: int = 0

    @property
    def dense(self) -> StructuresCost:
        """The model as it is."""
        return self.costs[0]

    def random(self, kept: int) -> StructuresCost | None:
        """As many structures at random; None if that was left out."""
        of_random = (c for c in self.costs if c.key == (RANDOM, kept))
        return next(of_random, None)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it, with each cost relative to the dense model."""
        return {
            "source": self.source,
            "kind": self.kind,
            "settings": dict(self.settings),
            "results": [
                cost.to_dict() | {"above_dense": cost.above(self.dense)} for cost in self.costs
            ],
        }
