"""The results of a comparison: each method's perplexity, relative to the dense model and EMP."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, Literal, get_args

from emp_llm.evaluation.perplexity import Perplexity
from emp_llm.report.source_fields import SourceFields

__all__ = ["CONTROLS", "WITH_DATA", "Comparison", "Control", "Cost", "Method", "WithData"]

Control = Literal["magnitude-row", "magnitude-layer", "pq-index", "random"]
WithData = Literal["wanda", "obs", "emp-repaired", "obs-repaired"]
Method = Literal["dense", "emp"] | Control | WithData

CONTROLS: tuple[Control, ...] = get_args(Control)
WITH_DATA: tuple[WithData, ...] = get_args(WithData)
"""EMP with scores or repair from data, or both."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of a model.

    Attributes:
        runs: The measurements; several only of random choices.
    """

    runs: tuple[Perplexity, ...]

    @property
    def perplexity(self) -> float:
        """Mean over the runs."""
        return fmean(run.perplexity for run in self.runs)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of the runs' perplexities; None for a single run."""
        return stdev(run.perplexity for run in self.runs) if len(self.runs) > 1 else None

    def above(self, other: "Measured") -> float:
        """How far the perplexity is above another one's, as a share of it; may be negative."""
        return self.perplexity / other.perplexity - 1


@dataclass(frozen=True, kw_only=True)
class Cost(Measured):
    """What one way to prune costs.

    Attributes:
        method: How weights were chosen.
        beta: The β whose number of weights it keeps; None for the dense model.
        weights: Weights of all targets.
        kept: How many of them stay.
    """

    method: Method
    beta: float | None
    weights: int
    kept: int

    @property
    def key(self) -> tuple[str, float | None]:
        """What no other row of a comparison has."""
        return self.method, self.beta

    @property
    def sparsity(self) -> float:
        """Share of the targets' weights that do not stay."""
        return (self.weights - self.kept) / self.weights

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Cost":
        """The cost that `to_dict` gave these fields of."""
        names = ("method", "beta", "weights", "kept")
        return cls(runs=runs_of(fields), **{name: fields[name] for name in names})

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return {
            "method": self.method,
            "beta": self.beta,
            "weights": self.weights,
            "kept": self.kept,
            "sparsity": self.sparsity,
            "perplexity": self.perplexity,
            "deviation": self.deviation,
            "runs": [asdict(run) for run in self.runs],
        }


def runs_of(fields: Mapping[str, Any]) -> tuple[Perplexity, ...]:
    """The measurements of a row, read from JSON."""
    return tuple(Perplexity(**run) for run in fields["runs"])


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `emp_llm.compare` found.

    Attributes:
        source: Name and revision of the model.
        settings: The options that were given.
        costs: The dense model's first, then for each β EMP's, those of its controls and those with
            data.
        taken: How many of the costs were not measured now, but by an earlier run that was saved.
    """

    source: SourceFields
    settings: Mapping[str, Any]
    costs: Sequence[Cost]
    taken: int = 0

    @property
    def dense(self) -> Cost:
        """The model as it is."""
        return self.costs[0]

    def emp(self, beta: float | None) -> Cost:
        """EMP at a β; the dense model for None."""
        return next(c for c in self.costs if c.beta == beta and c.method in ("dense", "emp"))

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it, with each cost relative to the dense model and to EMP."""
        return {
            "source": self.source,
            "settings": dict(self.settings),
            "results": [
                cost.to_dict()
                | {
                    "above_dense": cost.above(self.dense),
                    "above_emp": cost.above(self.emp(cost.beta)),
                }
                for cost in self.costs
            ],
        }
