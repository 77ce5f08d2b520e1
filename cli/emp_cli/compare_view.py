"""Prints comparisons, in tables that fit 80 columns."""

from typing import TYPE_CHECKING

import typer

from emp_cli.tables import count, show

if TYPE_CHECKING:
    from emp_llm.comparison.costs import Comparison, Cost, Measured
    from emp_llm.comparison.structures_costs import StructuresComparison

__all__ = ["show_comparison", "show_structures_compared"]

DENSE, RANDOM = "dense", "random"

_NAMES = {
    "dense": "dense",
    "emp": "EMP",
    "magnitude-row": "uniform rows",
    "magnitude-layer": "uniform layers",
    "pq-index": "PQ index",
    "random": "random",
    "wanda": "wanda",
    "obs": "obs",
    "emp-repaired": "EMP, repaired",
    "obs-repaired": "obs, repaired",
    "activation-repaired": "activation, repaired",
}


def show_comparison(found: "Comparison") -> None:
    """Print what each way to keep as many weights costs."""
    header = ("β", "method", "sparsity", "perplexity", "above dense", "above EMP")
    show(_title(found), header, [_row(found, cost) for cost in found.costs], left=2)
    typer.echo(_conclusion(found))


def show_structures_compared(found: "StructuresComparison") -> None:
    """Print what it costs to keep the structures that each score ranks best."""
    header = (found.kind, "score", "weights", "perplexity", "above dense", "above random")
    rows, before = [], None
    for cost in found.costs:
        random = None if cost.score in (DENSE, RANDOM) else found.random(cost.kept)
        rows.append(
            (
                "" if cost.kept == before else f"{cost.kept}",
                _NAMES.get(cost.score, cost.score),
                count(cost.weights),
                _perplexity(cost),
                "" if cost.score == DENSE else _share(cost.above(found.dense)),
                "" if random is None else _share(cost.above(random)),
            )
        )
        before = cost.kept
    show(_title(found), header, rows, left=2)


def _title(found: "Comparison | StructuresComparison") -> str:
    settings = found.settings
    return (
        f"{found.source['model']}  {settings['text']} in windows of {settings['context']}, "
        f"protocol {settings['protocol']}"
    )


def _row(found: "Comparison", cost: "Cost") -> tuple[str, ...]:
    leads = cost.beta is not None and cost.method == "emp"
    return (
        f"{cost.beta:g}" if leads else "",
        _NAMES[cost.method],
        f"{cost.sparsity:.2%}",
        _perplexity(cost),
        "" if cost.beta is None else _share(cost.above(found.dense)),
        "" if cost.beta is None or leads else _share(cost.above(found.emp(cost.beta))),
    )


def _perplexity(cost: "Measured") -> str:
    return " ± ".join(_number(n) for n in (cost.perplexity, cost.deviation) if n is not None)


def _number(number: float) -> str:
    return f"{number:,.2f}" if number < 1000 else f"{number:,.0f}"


def _share(share: float) -> str:
    return f"{share:+.2%}" if share < 10 else f"× {share + 1:,.0f}"


def _conclusion(found: "Comparison") -> str:
    """At how many β each control that ranks by magnitude is worse than EMP, a line each."""
    lines = []
    for method in ("magnitude-row", "magnitude-layer", "pq-index"):
        costs = [cost for cost in found.costs if cost.method == method]
        worse = sum(cost.above(found.emp(cost.beta)) > 0 for cost in costs)
        lines.append(f"EMP beats {_NAMES[method]} at {worse} of {len(costs)} β")
    return "\n".join(lines)
