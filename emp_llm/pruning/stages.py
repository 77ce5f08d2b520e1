"""The stages of a run over the targets of a plan: find β, select what stays, work on the shards."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.shard import Shard
from emp_llm.options import counts_magnitudes, needs_masks
from emp_llm.pruning.plan import PruningPlan
from emp_llm.runtime.pipeline import Piece
from emp_llm.runtime.team import Team
from emp_llm.runtime.workers import Workers
from emp_llm.selection.row_block_pass import RowBlockPass
from emp_llm.selection.selection import Selection, SharedGroup, passes, select
from emp_llm.selection.target_sparsity import find_beta
from emp_llm.tensors.target import Target

__all__ = [
    "Stage",
    "beta_for_target_sparsity",
    "own_share",
    "run_stage",
    "select_targets",
    "surveyed_shards",
]


def beta_for_target_sparsity(
    plan: PruningPlan, workers: Workers, scratch: Path | None = None
) -> float:
    """The β that prunes the target sparsity, where the weights alone determine it.

    Args:
        plan: The plan.
        workers: What reads the weights.
        scratch: A folder for what does not fit into memory; None for the usual one.

    Returns:
        The β; that of the options if none is to be found, or only scores from data can find it.

    Raises:
        CheckpointError: If a target cannot be read or holds NaN or infinity.
        OptionError: If no β prunes as much as was asked for, or as little.
    """
    options, team = plan.options, workers.team
    if options.target_sparsity is None or not counts_magnitudes(options):
        return options.beta
    shards = _own_part_of_targets(plan, workers)
    weights = sum(math.prod(target.entry.shape) for target in plan.all_targets)
    with plan.source.files(shards) as files, team.stopping(files.abandon):
        workers.progress.begin("finding β", plan.bytes_to_prune(plan.checkpoint.shards))
        return find_beta(
            plan.targets_of(shards),
            options.target_sparsity,
            options.granularity,
            RowBlockPass(files, workers.threads, workers.advance, workers.devices),
            weights=weights,
            team=team,
            scratch=scratch,
        )


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Work on shards once it is selected what stays in them.

    Attributes:
        name: What progress calls it.
        nbytes: Bytes that it works on, on all ranks together.
        shards: The shards that this rank works on.
        files: Their files, and those of `surveyed_shards`.
        pieces: Makes the pieces of work on a shard.
    """

    name: str
    nbytes: int
    shards: Sequence[Shard]
    files: OpenFiles
    pieces: Callable[[Shard, Selection], Iterator[Piece]]


def run_stage(
    plan: PruningPlan, workers: Workers, stage: Stage, given: Selection | None = None
) -> None:
    """Select what stays, and do the work of a stage.

    Args:
        plan: The plan.
        workers: What does the work.
        stage: The work.
        given: What stays, where that is known; None to select it.

    Raises:
        CheckpointError: If a target cannot be read or holds NaN or infinity.
        RankError: If another rank failed.
    """
    files, begin = stage.files, workers.progress.begin
    with workers.team.stopping(files.abandon):
        if given is None and plan.options.granularity == "layer":
            # a matrix needs no other one: each shard is selected in as it arrives
            begin(stage.name, _bytes_to_select(plan) + stage.nbytes)
            for shard in stage.shards:
                selection = select_targets(plan, workers, plan.targets[shard.name], files)
                workers.run(stage.pieces(shard, selection), files.abandon)
            return
        selection = given or _select_together(plan, workers, files)
        begin(stage.name, stage.nbytes)
        pieces = chain.from_iterable(stage.pieces(shard, selection) for shard in stage.shards)
        workers.run(pieces, files.abandon)


def select_targets(
    plan: PruningPlan,
    workers: Workers,
    targets: Sequence[Target],
    files: OpenFiles,
    shared: SharedGroup | None = None,
) -> Selection:
    """Select what stays in some targets, and report their bytes `passes` times.

    Args:
        plan: The plan, which holds the rule.
        workers: What reads the targets.
        targets: The targets.
        files: Their files.
        shared: As for `emp_llm.selection.selection.select`.

    Raises:
        CheckpointError: If a target cannot be read or holds NaN or infinity.
    """
    left = passes(plan.options) * sum(target.entry.nbytes for target in targets)

    def advance(nbytes: int) -> None:
        nonlocal left
        counted = min(nbytes, left)
        left -= counted
        workers.advance(counted)

    selection = select(
        targets,
        plan.options,
        files,
        threads=workers.threads,
        devices=workers.devices,
        progress=advance,
        shared=shared,
    )
    if left:  # most row blocks need not be read as often as was allowed for
        workers.advance(left)
    return selection


def surveyed_shards(plan: PruningPlan, workers: Workers) -> list[Shard]:
    """The shards that this rank reads to select what stays before any shard is worked on."""
    together = plan.options.granularity == "model" and not needs_masks(plan.options)
    return _own_part_of_targets(plan, workers) if together else []


def _select_together(plan: PruningPlan, workers: Workers, files: OpenFiles) -> Selection:
    """Select what stays in all shards; each rank reads its part of them."""
    if to_select := _bytes_to_select(plan):
        workers.progress.begin("selecting", to_select)
    own = plan.targets_of(surveyed_shards(plan, workers))
    shared = SharedGroup(plan.all_targets, workers.team)
    return select_targets(plan, workers, own, files, shared)


def _bytes_to_select(plan: PruningPlan) -> int:
    return passes(plan.options) * plan.bytes_to_prune(plan.checkpoint.shards)


def _own_part_of_targets(plan: PruningPlan, workers: Workers) -> list[Shard]:
    """This rank's part of the shards, where all targets are read before any is pruned."""
    shards = plan.checkpoint.shards
    return own_share(shards, lambda shard: plan.bytes_to_prune([shard]), workers.team)


def own_share(shards: Iterable[Shard], nbytes: Callable[[Shard], int], team: Team) -> list[Shard]:
    """This rank's share of some shards, in their order; each shard is one rank's.

    The largest is given out first, each to the rank that has the fewest bytes by then.
    """
    shards = list(shards)
    loads, shares = [0] * team.size, [set[str]() for _ in range(team.size)]
    for shard in sorted(shards, key=lambda shard: (-nbytes(shard), shard.name)):
        rank = loads.index(min(loads))
        loads[rank] += nbytes(shard)
        shares[rank].add(shard.name)
    return [shard for shard in shards if shard.name in shares[team.rank]]
