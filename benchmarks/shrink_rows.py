"""The rows of `shrink_table.py`: the dense model, and what `emp-llm shrink` makes of it.

A row's name is ``KIND-SCORE@AMOUNT``; ``+repair`` where what reads neurons or heads is repaired.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

__all__ = ["Row", "all_rows", "selected"]

BLOCKS = (29, 28, 27, 25)
NEURONS = ("5%", "10%", "20%")
KV_HEADS = ("2",)
WIDTHS = (
    ("activation", "obs"),
    ("obs", "obs"),
    ("activation", "none"),
    ("magnitude", "none"),
    ("random", "none"),
)
"""How neurons and heads are chosen and repaired."""


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Attributes:
        name: What it is called in the table.
        options: Options of ``emp-llm shrink``; None for the dense model.
        calibrated: Whether it is made from data.
        part_of: The row whose blocks went one by one, of which the first go in this one.
        seed: Seed of the samples, and of what is chosen at random.
        timed: Whether its speed is measured, beside that of the dense model. It depends on how many
            structures there are, and not on which.
    """

    name: str
    options: tuple[str, ...] | None = None
    calibrated: bool = True
    part_of: str | None = None
    seed: int = 0
    timed: bool = False


def all_rows() -> Iterator[Row]:
    """Every row, in the order of the table.

    >>> [row.name for row in all_rows()][:3]
    ['dense', 'blocks-influence@29', 'blocks-loss@29']
    """
    yield Row("dense", calibrated=False)
    last = f"blocks-loss@{BLOCKS[-1]}"
    for number in BLOCKS:
        for score in ("influence", "loss", "random"):
            yield Row(
                f"blocks-{score}@{number}",
                ("--blocks", str(number), "--block-score", score),
                calibrated=score != "random",
                part_of=last if score == "loss" and number != BLOCKS[-1] else None,
                timed=score == "influence",
            )
    for kind, amounts in (("neurons", NEURONS), ("kv-heads", KV_HEADS)):
        for amount in amounts:
            for score, repair in WIDTHS:
                yield Row(
                    f"{kind}-{score}{'+repair' if repair != 'none' else ''}@{amount}",
                    (f"--{kind}", amount, "--width-score", score, "--repair", repair),
                    calibrated=score in ("obs", "activation"),
                    timed=(score, repair) == WIDTHS[0],
                )


def selected(patterns: list[str]) -> list[Row]:
    """The rows whose names match a pattern, such as ``blocks-*@29``, in the order of the table.

    Raises:
        SystemExit: If a pattern matches none.

    >>> [row.name for row in selected(["dense", "blocks-loss*"])][:2]
    ['dense', 'blocks-loss@29']
    >>> [row.name for row in selected(["kv-heads-act*"])]
    ['kv-heads-activation+repair@2', 'kv-heads-activation@2']
    """
    rows = list(all_rows())
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            names = ", ".join(row.name for row in rows)
            raise SystemExit(f"no row is called {pattern}: choose among {names}")
    return [row for row in rows if any(fnmatchcase(row.name, pattern) for pattern in patterns)]
