"""What is to be pruned: a checkpoint, the rule, and which tensors are targets."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from emp_kernels.dispatch import load_backend

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.shard import Shard
from emp_llm.hub.source import Source
from emp_llm.options import PruneOptions
from emp_llm.report.source_fields import BaseFields, TensorCount
from emp_llm.runtime.team import Team
from emp_llm.structure.targets import Decisions, TargetDecision
from emp_llm.structure.targets_process import TargetsQuestion
from emp_llm.tensors.planes import check_names
from emp_llm.tensors.target import Target

__all__ = ["Delta", "PruningPlan"]


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What a plan for differences says of the base.

    Attributes:
        base: The base.
        in_base: The tensors that it has, so that they are not stored.
    """

    base: BaseFields
    in_base: TensorCount


@dataclass(frozen=True, kw_only=True)
class PruningPlan:
    """What is to be done to one checkpoint; nothing in it changes while that is done.

    Attributes:
        source: Where the checkpoint lies.
        checkpoint: What it holds. If two tied tensors are the same bytes of a file, it holds only
            the one that the other is tied to.
        options: The rule.
        decisions: The decision on every tensor, by name.
        missing: Parameters of the model that no tensor fills, so that transformers initialises
            them.
        targets: The tensors that are pruned, by the name of their shard.
        delta: What is said of the base where the targets are differences to one.
    """

    source: Source
    checkpoint: Checkpoint
    options: PruneOptions
    decisions: Mapping[str, TargetDecision]
    missing: Sequence[str]
    targets: Mapping[str, Sequence[Target]]
    delta: Delta | None = None

    @classmethod
    def make(
        cls, source: Source, checkpoint: Checkpoint, options: PruneOptions, team: Team | None = None
    ) -> "PruningPlan":
        """Decide which tensors are targets.

        Args:
            source: Where the checkpoint lies.
            checkpoint: All that it holds.
            options: The rule.
            team: The ranks, all of which call this; the first one decides for all.

        Raises:
            CheckpointError: If this checkpoint cannot be pruned.
        """
        if options.output_format == "packed":
            check_names(checkpoint.tensors)
        decisions, missing = _decide(source, checkpoint, options, team or Team())
        ties = {name: one.tied_to for name, one in decisions.items() if one.tied_to}
        checkpoint = checkpoint.without(checkpoint.stored_twice(ties))
        return cls(
            source=source,
            checkpoint=checkpoint,
            options=options,
            decisions=decisions,
            missing=missing,
            targets=_targets(checkpoint, decisions),
        )

    def of_checkpoint(self, checkpoint: Checkpoint, delta: Delta) -> "PruningPlan":
        """The same plan for a checkpoint that has differences in the place of targets.

        Args:
            checkpoint: The checkpoint; it may lack other tensors.
            delta: What is said of the base.
        """
        targets = _targets(checkpoint, self.decisions)
        return replace(self, checkpoint=checkpoint, targets=targets, delta=delta)

    def with_beta(self, beta: float) -> "PruningPlan":
        """The same plan with a β that was found, in place of the one in the options."""
        return replace(self, options=replace(self.options, beta=beta))

    def targets_of(self, shards: Iterable[Shard]) -> list[Target]:
        """The targets in these shards, in order."""
        return [target for shard in shards for target in self.targets[shard.name]]

    @property
    def all_targets(self) -> list[Target]:
        """The targets in all shards, in order."""
        return self.targets_of(self.checkpoint.shards)

    def bytes_to_prune(self, shards: Iterable[Shard]) -> int:
        """Bytes of the targets in these shards."""
        return sum(target.entry.nbytes for target in self.targets_of(shards))


def _targets(
    checkpoint: Checkpoint, decisions: Mapping[str, TargetDecision]
) -> dict[str, list[Target]]:
    """The targets of each shard, in the order of the data."""
    return {
        shard.name: [
            Target.of(shard, entry, transposed=decisions[entry.name].transposed)
            for entry in shard.header.tensors
            if decisions[entry.name].prune
        ]
        for shard in checkpoint.shards
    }


def _decide(source: Source, checkpoint: Checkpoint, options: PruneOptions, team: Team) -> Decisions:
    """Have the first rank decide which tensors are targets."""

    def ask() -> tuple[dict[str, dict[str, Any]], list[str]]:
        tensors = checkpoint.tensors.items()
        with TargetsQuestion(
            checkpoint.folder,
            {name: (entry.dtype, entry.shape) for name, (_, entry) in tensors},
            targets=options.targets,
            ignore=options.ignore,
            config=checkpoint.config if checkpoint.original else None,
            absent=checkpoint.absent,
            where=source.repo_id,
        ) as question:
            load_backend()  # takes seconds, in which the other process reads the model's code
            answer = question.answer()
        decisions = {name: asdict(decision) for name, decision in answer.tensors.items()}
        return decisions, answer.missing

    if not team.leads:
        load_backend()
    decisions, missing = team.share(ask)
    return Decisions(
        {name: TargetDecision(**fields) for name, fields in decisions.items()}, missing
    )
