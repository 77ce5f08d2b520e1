"""A plan made one of differences: targets less those of a base, and what the base has left out."""

from dataclasses import replace

from emp_kernels.numbers import FORMATS

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.deltas.base import Base
from emp_llm.deltas.differences import difference_to
from emp_llm.deltas.survey import survey
from emp_llm.errors import CheckpointError, OptionError
from emp_llm.options import NO_TARGETS, PruneOptions, needs_masks
from emp_llm.pruning.plan import Delta, PruningPlan
from emp_llm.runtime.workers import Workers

__all__ = ["check_delta_options", "less_base", "plan_delta"]


def check_delta_options(options: PruneOptions, *, discard_source: bool) -> None:
    """Check that options make sense for a delta, before anything is read.

    Raises:
        OptionError: If one does not.
    """
    remedy = "leave it out, or prune the whole model, without a base"
    if needs_masks(options) or options.max_loss_increase is not None:
        raise OptionError(
            "base: scores from data, repair and a search by the loss need the weights that a model "
            f"computes with, and differences are none: {remedy}"
        )
    if options.output_format != "packed":
        raise OptionError(
            "base: a delta is always packed: leave the format out, and make an ordinary checkpoint "
            "of the result by `emp-llm unpack`"
        )
    if options.targets == NO_TARGETS:
        raise OptionError(f"base: targets is {NO_TARGETS!r}, so no difference is taken: {remedy}")
    if options.granularity != "row":
        raise OptionError(
            f"base: granularity is {options.granularity!r}, but differences are sampled row by "
            "row: leave it out"
        )
    if discard_source:
        raise OptionError(
            "discard_source: the tensors that are compared with the base's are read twice: "
            "leave it out"
        )


def plan_delta(plan: PruningPlan, base: Base, workers: Workers) -> PruningPlan:
    """The plan for differences to a base.

    Tensors that are not pruned and that the base has, the same to the bit, are left out.

    Args:
        plan: The plan for the fine-tuned model.
        base: The base.
        workers: What reads the base, and the tensors that are not pruned.

    Raises:
        CheckpointError: If the base is one of another model.
    """
    _check_fits(plan, base)
    targets = {target.name for target in plan.all_targets}
    rest = {name: place for name, place in plan.checkpoint.tensors.items() if name not in targets}

    def read() -> tuple[str, list[str]]:
        with plan.source.files(plan.checkpoint.shards) as files:
            found = survey(base.checkpoint, workers, rest, files)
            return found.hash, sorted(found.same)

    checksum, same = workers.team.share(read)
    checkpoint = less_base(plan, plan.checkpoint, base.checkpoint).without(same)
    delta = Delta(
        base={**base.place, "hash": checksum},
        in_base={"tensors": len(same), "bytes": sum(rest[name][1].nbytes for name in same)},
    )
    shards = tuple(shard for shard in checkpoint.shards if shard.header.tensors)
    return plan.of_checkpoint(replace(checkpoint, shards=shards), delta)


def less_base(plan: PruningPlan, checkpoint: Checkpoint, base: Checkpoint) -> Checkpoint:
    """A checkpoint with the plan's targets read as differences to a base."""
    return difference_to(checkpoint, base, {target.name for target in plan.all_targets})


def _check_fits(plan: PruningPlan, base: Base) -> None:
    """Check that the base has all targets, and nothing that the fine-tuned model lacks."""
    model, tensors = plan.checkpoint.folder, base.checkpoint.tensors
    if model.samefile(base.checkpoint.folder):
        raise CheckpointError(
            f"{base.name}: is the model itself, to which there is no difference; give the model "
            "that it was fine-tuned from as base"
        )
    remedy = "give the model that it was fine-tuned from as base"
    kinds = [c.config.get("model_type") for c in (plan.checkpoint, base.checkpoint)]
    if kinds[0] != kinds[1]:
        raise CheckpointError(
            f"{base.name}: is of model type {kinds[1]!r}, {model} is {kinds[0]!r}; {remedy}"
        )
    for target in plan.all_targets:
        _, entry = tensors.get(target.name, (None, None))
        if entry is None or entry.shape != target.entry.shape or entry.dtype not in FORMATS:
            found = f"{entry.dtype} {list(entry.shape)}" if entry else "not there"
            raise CheckpointError(
                f"{base.name}: tensor {target.name!r} is {found}, in {model} it is "
                f"{target.entry.dtype} {list(target.entry.shape)}; {remedy}"
            )
    for name in tensors.keys() - plan.checkpoint.tensors.keys():
        raise CheckpointError(
            f"{base.name}: has a tensor {name!r} that {model} lacks, and would give it to the "
            "model: save both by save_pretrained of one release of transformers"
        )
