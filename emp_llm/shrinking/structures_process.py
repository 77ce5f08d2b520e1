"""Questions about structures, answered in a process of its own: see `emp_llm.structure.question`.

which structures are there, and how does each tensor depend on them?    `find_structures`
what is the config with fewer, and do these tensors fit it?             `fit_config`
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emp_llm.errors import CheckpointError
from emp_llm.options import NO_TARGETS
from emp_llm.runtime.quiet import calm
from emp_llm.shrinking.axes import Axis, Comparison, find_axes
from emp_llm.shrinking.block_likeness import check_alike
from emp_llm.shrinking.choice import Choice, KindName, Structures
from emp_llm.shrinking.config_fields import ModelConfig
from emp_llm.shrinking.kind import Amounts, Kind
from emp_llm.shrinking.kinds import KINDS
from emp_llm.structure.completeness import Structure, check_complete, read_structure
from emp_llm.structure.landing import Landing
from emp_llm.structure.meta_model import build_meta_model
from emp_llm.structure.question import Question
from emp_llm.structure.stored_forms import check_not_quantized
from emp_llm.structure.targets import decide

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Found", "find_structures", "fit_config"]

Shapes = Mapping[str, tuple[int, ...]]
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of each tensor, by name."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The structures of a checkpoint's model.

    Attributes:
        structures: Those of each kind that was asked for.
        axes: How each tensor depends on them, by its name; of those that do.
        outside: Names of tensors that the model has no place for.
        matrices: Names of tensors that are linear layers, or such of several experts.
        transposed: Those of them that are stored [.., in, out] rather than [.., out, in].
        tied: By tensor, the one that it is tied to in the model.
        missing: How many parameters of the model no tensor fills.
        refused: Why there are none of the other kinds that were asked for, or none can go.
    """

    structures: Mapping[KindName, Structures]
    axes: Mapping[str, Sequence[Axis]]
    outside: Sequence[str]
    matrices: Sequence[str]
    transposed: Sequence[str]
    tied: Mapping[str, str]
    missing: int
    refused: Mapping[KindName, str] = field(default_factory=dict)


def find_structures(
    folder: Path,
    tensors: Tensors,
    config: Mapping[str, Any],
    kinds: Sequence[KindName],
    *,
    absent: Mapping[str, str],
    where: str,
    refusing: bool = True,
) -> Found:
    """Find the structures of some kinds, and how each tensor of a checkpoint depends on them.

    Args:
        folder: The checkpoint's folder.
        tensors: Its tensors.
        config: The content of its config.json.
        kinds: What to look for.
        absent: As for `emp_llm.structure.targets.decide_all`.
        where: What the user calls the checkpoint, for errors.
        refusing: Whether a kind that the model does not have is an error; else `Found.refused`
            tells of it.

    Raises:
        CheckpointError: As `emp_llm.structure.targets.decide_all` does; if the model has none of a
            kind, or is made of them in a way that is not known.
    """
    asked = {
        "folder": str(folder),
        "tensors": tensors,
        "config": dict(config),
        "kinds": list(kinds),
        "absent": dict(absent),
        "where": where,
        "refusing": refusing,
    }
    with Question(_reply, asked) as question:
        answer = question.answer()
    return Found(
        structures={
            kind: Structures(**{**fields, "holders": tuple(fields["holders"])})
            for kind, fields in answer["structures"].items()
        },
        axes={
            name: [Axis(**{**axis, "widths": tuple(axis["widths"])}) for axis in axes]
            for name, axes in answer["axes"].items()
        },
        outside=answer["outside"],
        matrices=answer["matrices"],
        transposed=answer["transposed"],
        tied=answer["tied"],
        missing=answer["missing"],
        refused=answer["refused"],
    )


def fit_config(
    folder: Path,
    tensors: Tensors,
    config: Mapping[str, Any],
    choices: Sequence[Choice],
    *,
    missing: int,
    where: str,
) -> dict[str, Any]:
    """The config of the model with the structures that stay; the tensors are checked against it.

    Args:
        folder: The source's folder.
        tensors: What will be written.
        config: The content of the source's config.json.
        choices: Which structures stay, of each kind.
        missing: How many parameters of the source's model no tensor fills.
        where: What the user calls the source, for errors.

    Returns:
        The content of the new config.json.

    Raises:
        CheckpointError: If the tensors are not what a model of the new config is loaded from.
    """
    asked = {
        "folder": str(folder),
        "tensors": tensors,
        "config": dict(config),
        "kept": {choice.kind: next(iter(choice.kept.values())) for choice in choices},
        "missing": missing,
        "where": where,
    }
    with Question(_reply, asked) as question:
        return dict(question.answer()["config"])


def _reply(question: Mapping[str, Any]) -> dict[str, Any]:
    tensors = {name: (dtype, tuple(shape)) for name, (dtype, shape) in question["tensors"].items()}
    folder, where = Path(question["folder"]), question["where"]
    if "kept" in question:
        return _fit(folder, tensors, question, where)
    return _find(folder, tensors, question, where)


def _find(
    folder: Path, tensors: Tensors, question: Mapping[str, Any], where: str
) -> dict[str, Any]:
    config, absent = question["config"], question["absent"]
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    structure = read_structure(folder, shapes, config, absent, where)
    check_complete(where, structure, absent)
    check_not_quantized(where, structure.landings)
    decisions = decide(where, tensors, structure.landings, targets=NO_TARGETS, ignore=())
    structures: dict[str, Any] = {}
    refused: dict[str, str] = {}
    axes: dict[str, list[Axis]] = {}
    with calm():
        build = partial(build_meta_model, folder, len(tensors))
        full = build(config)
        made = ModelConfig(config, full.config)
        for name in question["kinds"]:
            try:
                amounts, found = _of_kind(KINDS[name], made, full, build, structure, shapes, where)
            except CheckpointError as error:
                if question["refusing"]:
                    raise
                refused[name] = str(error)
                continue
            for tensor, own in found.items():
                axes.setdefault(tensor, []).extend(own)
            holders = dict.fromkeys(axis.holder for own in found.values() for axis in own)
            structures[name] = {"kind": name, "holders": [*holders], **asdict(amounts)}
    return {
        "structures": structures,
        "axes": {name: [asdict(axis) for axis in own] for name, own in axes.items()},
        "outside": [name for name, landing in structure.landings.items() if landing is None],
        "matrices": [name for name, one in structure.landings.items() if _is_matrix(one)],
        "transposed": [name for name, one in structure.landings.items() if _is_transposed(one)],
        "tied": {name: one.tied_to for name, one in decisions.items() if one.tied_to},
        "missing": len(structure.missing),
        "refused": refused,
    }


def _of_kind(
    kind: Kind,
    made: ModelConfig,
    full: "PreTrainedModel",
    build: Callable[[Mapping[str, Any]], "PreTrainedModel"],
    structure: Structure,
    shapes: Shapes,
    where: str,
) -> tuple[Amounts, Mapping[str, Sequence[Axis]]]:
    """How many structures of a kind there are, and how tensors depend on them."""
    amounts = kind.amounts(made)
    fewer = kind.compared(amounts)
    compared = Comparison(
        kind=kind,
        full=full,
        number=amounts.number,
        reduced=build(kind.resized(made, range(fewer))),
        fewer=fewer,
    )
    if obstacle := kind.obstacle(compared.full, compared.reduced):
        raise CheckpointError(f"{where}: {obstacle}")
    found = find_axes(compared, shapes, structure.landings)
    if not found:
        raise CheckpointError(
            f"{where}: {amounts.field} in config.json gives the number of {kind.name}, but no "
            "weights depend on it: no layer of this model has any"
        )
    return amounts, found


def _is_transposed(landing: Landing | None) -> bool:
    return landing is not None and landing.place.transposed != landing.flipped


def _is_matrix(landing: Landing | None) -> bool:
    return landing is not None and landing.place.why_not is None


def _fit(folder: Path, tensors: Tensors, question: Mapping[str, Any], where: str) -> dict[str, Any]:
    config, shapes = question["config"], {name: shape for name, (_, shape) in tensors.items()}
    where = f"{where}, shrunken"
    with calm():
        model = build_meta_model(folder, len(tensors), config)
        for name, kind in KINDS.items():
            if name not in question["kept"]:
                continue
            kept, before = question["kept"][name], model
            config = kind.resized(ModelConfig(config, before.config), kept)
            model = build_meta_model(folder, len(tensors), config)
            if name == "blocks":
                check_alike(before, model, kept)
    structure = read_structure(folder, shapes, config, where=where)
    check_complete(where, structure, {})
    decide(where, tensors, structure.landings, targets=NO_TARGETS, ignore=())
    _check_filled(where, model, shapes, structure, question["missing"])
    return {"config": config}


def _check_filled(
    where: str, model: "PreTrainedModel", shapes: Shapes, structure: Structure, missing: int
) -> None:
    """Check that each parameter gets as many weights as it has, merged ones too."""
    if len(structure.missing) > missing:
        raise CheckpointError(
            f"{where}: no tensor would give {next(iter(structure.missing))!r}, which the model of "
            "the new config.json has: emp-llm does not know how this model is made"
        )
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    given, needed = Counter[str](), dict[str, int]()
    for name, landing in structure.landings.items():
        if landing is None:
            raise CheckpointError(
                f"{where}: the model of the new config.json has no place for {name!r}: emp-llm "
                "does not know how this model is made"
            )
        if landing.name in sizes:
            given[landing.name] += math.prod(shapes[name])
            needed[landing.name] = sum(sizes[one] for one in (landing.name, *landing.others))
    for name, weights in needed.items():
        if given[name] != weights:
            raise CheckpointError(
                f"{where}: {name!r} would get {given[name]:,} weights, and by the new config.json "
                f"it has {weights:,}: emp-llm does not know how this model is made"
            )
