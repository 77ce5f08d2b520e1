"""Which tensors of a checkpoint are targets, and why the others are not."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from emp_llm.checkpoint.dtypes import PRUNABLE
from emp_llm.errors import CheckpointError
from emp_llm.options import NO_TARGETS
from emp_llm.structure.completeness import check_complete, read_structure
from emp_llm.structure.landing import Landing
from emp_llm.structure.places import Place
from emp_llm.structure.stored_forms import check_gathered, check_not_quantized

__all__ = [
    "Decisions",
    "TargetDecision",
    "block_in_checkpoint",
    "decide",
    "decide_all",
    "decide_targets",
    "module_name",
]

_NAMED_TARGETS = ("mlp", "attention", "all-linear", NO_TARGETS)
_EXAMPLES = 3
_REMEDIES = {
    "F64": "Cast the checkpoint: from_pretrained(..., dtype='float32') and save_pretrained.",
    **dict.fromkeys(("BOOL", "C64"), "To leave such weights as they are, add --ignore {layer!r}."),
}
"""What helps against a dtype of a target that is no sign of quantized weights."""


@dataclass(frozen=True, kw_only=True)
class TargetDecision:
    """Whether a tensor of a checkpoint is a target, and why.

    Attributes:
        name: Its name in the checkpoint.
        prune: Whether it is a target, and so pruned.
        reason: Why, or why not, in a few plain words.
        kind: The name of its layer in its decoder block, for tables: 'up_proj', 'experts.w1'; as
            much of the path as no other layer of the block shares. Outside decoder blocks, and for
            tensors of other modules, the name of the module.
        block: What the names of all tensors of its decoder block begin with in the checkpoint, such
            as 'model.layers.3'; None outside decoder blocks.
        transposed: Whether it is stored [.., in, out], so that the weights into one output neuron
            run along dimension -2; otherwise they run along dimension -1.
        tied_to: Name of the tensor that it is tied to in the model, so that the model is complete
            without this one; None if there is none.
        saved: Whether transformers writes it when it saves the model: the model has it, and does
            not compute it anew.
    """

    name: str
    prune: bool
    reason: str
    kind: str
    block: str | None
    transposed: bool
    tied_to: str | None = None
    saved: bool = True


class Decisions(NamedTuple):
    """The decisions on all tensors of a checkpoint.

    Attributes:
        tensors: The decision on each tensor, by its name.
        missing: Names of the parameters of the model that no tensor fills, so that transformers
            initialises them, as it does with a head that is still to be trained.
    """

    tensors: dict[str, TargetDecision]
    missing: list[str]


def decide_targets(
    folder: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    *,
    targets: str = "mlp",
    ignore: Sequence[str] = (),
) -> dict[str, TargetDecision]:
    """Decide by the model's structure which tensors of a checkpoint are targets.

    Targets are matrices of linear layers: ``nn.Linear``, transformers' ``Conv1D`` and the fused
    weights of experts, whether the checkpoint holds them fused or one by one. Embeddings, the
    output head and what is tied to them, norms, biases and routers are never targets. See
    `emp_llm.structure.completeness.read_structure` for what is a decoder block, attention or a
    router.

    Args:
        folder: The checkpoint's folder; only its ``config.json`` is read.
        tensors: Dtype, as safetensors names it ("BF16"), and shape of each tensor, by name.
        targets: ``mlp`` (linear layers of decoder blocks, without attention), ``attention`` (those
            of attention), ``all-linear`` (both), ``none``, or a regular expression searched in the
            checkpoint's names, which finds linear layers outside decoder blocks as well.
        ignore: Regular expressions; a tensor in whose name one of them is found is not a target.

    Returns:
        The decision for each tensor by name, in the given order.

    Raises:
        CheckpointError: As `decide_all` does.
    """
    return decide_all(folder, tensors, targets=targets, ignore=ignore).tensors


def decide_all(
    folder: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    *,
    targets: str,
    ignore: Sequence[str],
    config: Mapping[str, Any] | None = None,
    absent: Mapping[str, str] = MappingProxyType({}),
    where: str | None = None,
) -> Decisions:
    """`decide_targets`, and what the checkpoint lacks.

    Args:
        folder: As for `decide_targets`.
        tensors: As for `decide_targets`.
        targets: As for `decide_targets`.
        ignore: As for `decide_targets`.
        config: The content of ``config.json`` if the folder has none.
        absent: The tensors that the checkpoint's index lists and no file has, with the file that
            it names.
        where: What the user calls the checkpoint, for errors; by default its folder.

    Raises:
        CheckpointError: If no model can be built from the config (see
            `emp_llm.structure.meta_model.build_meta_model`), a tensor does not fit it or is missing
            (see `emp_llm.structure.completeness.check_complete`), a target is not float16, bfloat16
            or float32, or there is not a target that is asked for.
    """
    where = str(folder) if where is None else where
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    structure = read_structure(folder, shapes, config, absent, where)
    check_complete(where, structure, absent)
    decisions = decide(where, tensors, structure.landings, targets=targets, ignore=ignore)
    return Decisions(decisions, list(structure.missing))


def decide(
    where: str,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    landings: Mapping[str, Landing | None],
    *,
    targets: str,
    ignore: Sequence[str],
) -> dict[str, TargetDecision]:
    """`decide_targets`, once it is known which parameter each tensor is loaded into.

    Args:
        where: The checkpoint or model, for errors.
        tensors: As for `decide_targets`.
        landings: The parameter that each tensor is loaded into, by the tensor's name.
        targets: As for `decide_targets`.
        ignore: As for `decide_targets`.

    Raises:
        CheckpointError: As `decide_targets` does, but for the config.
    """
    check_gathered(where, {name: shape for name, (_, shape) in tensors.items()}, landings)
    for name, (_, shape) in tensors.items():
        _check_shape(where, name, shape, landings)
    kinds = _kinds(landings)
    rule = _Rule(targets, tuple(ignore))
    decisions = {
        name: _decide(name, shape, landings[name], kinds[name], rule)
        for name, (_, shape) in tensors.items()
    }
    for name, tied_to in _ties(landings).items():
        decisions[name] = replace(decisions[name], tied_to=tied_to)
    for name, (dtype, _) in tensors.items():
        if decisions[name].prune and dtype not in PRUNABLE:
            check_not_quantized(where, landings)
            raise _not_prunable(decisions[name], dtype)
    if targets != NO_TARGETS and not any(decision.prune for decision in decisions.values()):
        check_not_quantized(where, landings)
        raise _nothing_matches(where, landings, kinds, rule)
    return decisions


def _ties(landings: Mapping[str, Landing | None]) -> dict[str, str]:
    """By tensor, the tensor of the parameter that its own is tied to.

    If the checkpoint has none for that one, it is the first of the others that are tied to it.
    """
    # a place names the parameter that it is tied to; a decision names the checkpoint's tensor
    holders = {landing.name: name for name, landing in landings.items() if landing is not None}
    ties = {}
    for name, landing in landings.items():
        if landing is None or landing.place.tied_to is None:
            continue
        holder = holders.setdefault(landing.place.tied_to, name)
        if holder != name:
            ties[name] = holder
    return ties


@dataclass(frozen=True)
class _Rule:
    targets: str
    ignore: tuple[str, ...]


def _decide(
    name: str, shape: tuple[int, ...], landing: Landing | None, kind: str, rule: _Rule
) -> TargetDecision:
    if landing is None:
        return TargetDecision(
            name=name,
            prune=False,
            reason="not part of the model",
            kind=kind,
            block=None,
            transposed=False,
            saved=False,
        )
    place = landing.place
    why_not = _why_not(name, shape, place, rule)
    return TargetDecision(
        name=name,
        prune=why_not is None,
        reason=why_not or _why(place),
        kind=kind,
        block=block_in_checkpoint(name, place.block) if place.block else None,
        transposed=place.why_not is None and place.transposed != landing.flipped,
        saved=place.saved,
    )


def _why(place: Place) -> str:
    if place.attention:
        return "linear layer of attention"
    return "linear layer of an expert" if place.expert else "linear layer outside attention"


def _why_not(name: str, shape: tuple[int, ...], place: Place, rule: _Rule) -> str | None:
    if place.why_not is not None:
        return place.why_not
    if len(shape) not in (2, 3):
        return "not a matrix"
    if 0 in shape:
        return "without any weight"
    off_target = _off_target(name, place, rule.targets)
    if off_target is not None:
        return off_target
    hit = next((pattern for pattern in rule.ignore if re.search(pattern, name)), None)
    return None if hit is None else f"ignored by --ignore {hit!r}"


def _off_target(name: str, place: Place, targets: str) -> str | None:
    if targets not in _NAMED_TARGETS:
        return None if re.search(targets, name) else "not matched by the targets"
    if targets == NO_TARGETS:
        return "nothing is pruned (targets=none)"
    if place.block is None:
        return "outside the blocks"
    if targets == "mlp" and place.attention:
        return "attention (targets=mlp)"
    if targets == "attention" and not place.attention:
        return "not attention (targets=attention)"
    return None


def block_in_checkpoint(name: str, block: str) -> str:
    """The name of a decoder block in the checkpoint, which may differ from that in the model.

    It is the tensor's name up to the index of the block.

    >>> block_in_checkpoint("h.3.mlp.c_fc.weight", "transformer.h.3")
    'h.3'
    """
    parts = name.split(".")
    *_, list_name, index = block.split(".")
    # the same number may occur twice, as that of an expert too: the one behind the list's name is
    # preferred, the first one taken where the checkpoint calls the list by another name
    ends = [i for i, part in enumerate(parts) if part == index and i > 0]
    end = next((i for i in ends if parts[i - 1] == list_name), next(iter(ends), None))
    return block if end is None else ".".join(parts[: end + 1])


def _kinds(landings: Mapping[str, Landing | None]) -> dict[str, str]:
    """Name each layer by the shortest end of its path that no other layer of a block has.

    So tables have one line for all layers named up_proj, whichever block they are in.
    """
    paths = {name: _path_in_block(name, landing) for name, landing in landings.items()}
    ends = Counter(path[i:] for path in set(paths.values()) for i in range(len(path)))
    kinds = {path: _kind(path, ends) for path in set(paths.values())}
    return {name: kinds[path] or module_name(name) for name, path in paths.items()}


def _path_in_block(name: str, landing: Landing | None) -> tuple[str, ...]:
    """Path of a linear layer in its block, without indices; empty for any other tensor."""
    if landing is None or landing.place.why_not is not None or landing.place.block is None:
        return ()
    path = name.removeprefix(block_in_checkpoint(name, landing.place.block) + ".")
    return tuple(part for part in path.removesuffix(".weight").split(".") if not part.isdigit())


def _kind(path: tuple[str, ...], ends: Counter[tuple[str, ...]]) -> str:
    # 'experts.w1', not 'w1': on its own the name does not say that it is an expert's
    least = 2 if "experts" in path[-2:-1] else 1
    lengths = range(least, len(path))
    length = next((n for n in lengths if ends[path[-n:]] == 1), len(path))
    return ".".join(path[-length:])


def module_name(name: str) -> str:
    """The last part of a tensor's name that names a module.

    >>> module_name("model.layers.3.mlp.up_proj.weight")
    'up_proj'
    """
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else name


def _check_shape(
    where: str, name: str, shape: tuple[int, ...], landings: Mapping[str, Landing | None]
) -> None:
    landing = landings[name]
    if landing is None or not landing.whole or landing.place.shape in (None, shape):
        return
    check_not_quantized(where, landings)
    raise CheckpointError(
        f"{name!r} has the shape {list(shape)}, but by config.json {landing.name!r} has "
        f"{list(landing.place.shape or ())}: the weights and the config do not belong together"
    )


def _not_prunable(decision: TargetDecision, dtype: str) -> CheckpointError:
    layer = decision.kind.rpartition(".")[2]
    remedy = _REMEDIES.get(dtype, "Load a dequantized checkpoint or add --ignore {layer!r}.")
    return CheckpointError(
        f"{decision.name!r} is {dtype}; emp-llm prunes float16, bfloat16 and float32. "
        f"{remedy.format(layer=layer)}"
    )


def _nothing_matches(
    where: str, landings: Mapping[str, Landing | None], kinds: Mapping[str, str], rule: _Rule
) -> CheckpointError:
    linear = {
        kinds[name]: name
        for name, landing in landings.items()
        if landing is not None and landing.place.why_not is None
    }
    options = " ".join([f"targets {rule.targets!r}", *(f"ignore {p!r}" for p in rule.ignore)])
    found = (
        f"linear layers it has: {', '.join(map(repr, list(linear.values())[:_EXAMPLES]))}"
        if linear
        else "it has no linear layer that can be pruned"
    )
    return CheckpointError(f"{where}: nothing to prune with {options}; {found}")
