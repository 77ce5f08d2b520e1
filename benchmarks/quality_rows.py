"""The rows of `quality_table.py`: the dense model, what emp-llm makes of it, and other pruners.

A row's name is ``WHAT@AMOUNT``, with ``#SEED`` where several seeds are measured. The amount is β,
or the sparsity of all targets together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from emp_llm import PruneOptions

__all__ = ["Row", "all_rows", "selected"]

BETAS = ("1", "0.75")
HALF = "50%"
ALLOCATIONS = ("emp", "uniform", "loss")
SEEDS = (0, 1, 2)
CRITERIA = ("magnitude", "wanda", "ria", "obs")
PEERS = ("sparsegpt", "wanda")


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Attributes:
        name: What it is called in the table.
        prune: Options of ``emp-llm prune``; None if that does not make it.
        calibrated: Whether it is made from data.
        seed: Seed of the samples.
        peer: The method of llm-compressor that makes it, if one does.
        amount: β, or the sparsity of all targets together in percent. A peer is given the total
            sparsity of that β.
    """

    name: str
    prune: tuple[str, ...] | None = None
    calibrated: bool = True
    seed: int = 0
    peer: str | None = None
    amount: str = "1"

    @property
    def options(self) -> PruneOptions:
        """How much is pruned, as `emp_llm.prune` takes it."""
        if self.amount.endswith("%"):
            return PruneOptions(target_sparsity=float(self.amount[:-1]) / 100)
        return PruneOptions(beta=float(self.amount))


def all_rows() -> Iterator[Row]:
    """Every row, in the order of the table.

    >>> [row.name for row in all_rows()][:4]
    ['dense', 'magnitude@1', 'magnitude+repair@1', 'wanda@1']
    """
    yield Row("dense", calibrated=False)
    for beta in BETAS:
        for criterion in CRITERIA:
            score = ("--beta", beta, "--criterion", criterion)
            if criterion != "magnitude":
                score += ("--count-by", "magnitude")
            plain = (*score, "--repair", "none")
            yield Row(f"{criterion}@{beta}", plain, calibrated=criterion != "magnitude")
            if criterion != "obs":  # that is the preset `repaired`
                yield Row(f"{criterion}+repair@{beta}", (*score, "--repair", "obs"))
        for preset, seeds in (("repaired", SEEDS), ("best", SEEDS[:1])):
            options = ("--beta", beta, "--preset", preset)
            for seed in seeds:
                yield Row(f"preset-{preset}@{beta}#{seed}", options, seed=seed)
        yield from _allocated(beta, ("--beta", beta), ALLOCATIONS[1:])
        yield from (Row(f"peer-{peer}@{beta}", peer=peer, amount=beta) for peer in PEERS)
    yield from _allocated(HALF, ("--target-sparsity", "0.5"), ALLOCATIONS)
    yield from (Row(f"peer-{peer}@{HALF}", peer=peer, amount=HALF) for peer in PEERS)


def _allocated(amount: str, options: tuple[str, ...], how: tuple[str, ...]) -> Iterator[Row]:
    """The preset `repaired`, with the same total allocated in several ways."""
    for allocate in how:
        prune = (*options, "--preset", "repaired", "--allocate", allocate)
        yield Row(f"allocate-{allocate}@{amount}", prune)


def selected(patterns: list[str]) -> list[Row]:
    """The rows whose names match a pattern, such as ``*+repair@1``, pattern by pattern.

    Raises:
        SystemExit: If a pattern matches none.

    >>> [row.name for row in selected(["peer-*@1", "dense"])]
    ['peer-sparsegpt@1', 'peer-wanda@1', 'dense']
    """
    rows = list(all_rows())
    found: dict[str, Row] = {}
    for pattern in patterns:
        matching = {row.name: row for row in rows if fnmatchcase(row.name, pattern)}
        if not matching:
            names = ", ".join(row.name for row in rows)
            raise SystemExit(f"no row is called {pattern}: choose among {names}")
        found |= {name: row for name, row in matching.items() if name not in found}
    return list(found.values())
