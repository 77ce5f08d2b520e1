"""How each tensor of a checkpoint depends on the structures of a kind.

Two models are built from the config, with all structures and with fewer of them, and compared.
Lists of modules that are shorter in the second show which numbers in names count structures, and
sizes that are smaller show in which dimensions of parameters they lie.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from emp_llm.errors import CheckpointError
from emp_llm.shrinking.choice import KindName
from emp_llm.shrinking.kind import Kind, Resized
from emp_llm.structure.landing import Landing
from emp_llm.structure.targets import block_in_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Axis", "Comparison", "find_axes"]

_NUMBERED = re.compile(r"(.*?)(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One way in which a tensor depends on structures: it is one's own, or holds some of each.

    Attributes:
        kind: What they are.
        holder: What holds them, see `emp_llm.shrinking.choice.Structures.holders`.
        part: Which part of the tensor's name, split at dots, ends with the number of the structure
            that the tensor belongs to; None if it holds all of them.
        dimension: Along which dimension it holds all of them; None if it belongs to one.
        widths: As `emp_llm.shrinking.kind.Kind.widths` gives them for this dimension.
    """

    kind: KindName
    holder: str
    part: int | None = None
    dimension: int | None = None
    widths: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models of one config, on the meta device, that differ in the number of structures.

    Attributes:
        kind: What they are.
        full: The model with all of them.
        number: How many these are.
        reduced: The model with fewer.
        fewer: How many these are.
    """

    kind: Kind
    full: "PreTrainedModel"
    number: int
    reduced: "PreTrainedModel"
    fewer: int


class _Part(NamedTuple):
    """A parameter belongs to one structure, whose number a part of its name ends with."""

    part: int


class _Dimension(NamedTuple):
    """A parameter holds all structures along a dimension."""

    dimension: int
    widths: tuple[int, ...]


_Axes = Mapping[str, list[_Part | _Dimension]]


def find_axes(
    compared: Comparison,
    shapes: Mapping[str, tuple[int, ...]],
    landings: Mapping[str, Landing | None],
) -> dict[str, tuple[Axis, ...]]:
    """How the tensors of a checkpoint depend on the structures of a kind.

    Args:
        compared: The models.
        shapes: Shape of each tensor, by name.
        landings: The parameter of the full model that each tensor is loaded into.

    Returns:
        The axes of each tensor that has any, by its name.

    Raises:
        CheckpointError: If something changes with the number of structures in a way that is not
            known here.
    """
    axes = _parameter_axes(compared)
    sizes = {name: tuple(tensor.shape) for name, tensor in compared.full.state_dict().items()}
    stacked = _stacked_parts(compared.number, landings)
    found = {}
    for name, landing in landings.items():
        if landing is None or landing.name not in axes:
            continue
        tensor = _Tensor(name, shapes[name], landing, stacked.get(name))
        found[name] = tuple(
            _with_holder(compared.kind.name, tensor, axis)
            for axis in _tensor_axes(tensor, axes, sizes, compared.kind.name)
        )
    return found


def _parameter_axes(compared: Comparison) -> dict[str, list[_Part | _Dimension]]:
    """The axes of each parameter and buffer of the full model that has any."""
    full, reduced = compared.full.state_dict(), compared.reduced.state_dict()
    before, after = _list_lengths(full), _list_lengths(reduced)
    shortened = {
        prefix
        for prefix, length in before.items()
        if (length, after.get(prefix)) == (compared.number, compared.fewer)
    }
    found = defaultdict[str, list[_Part | _Dimension]](list)
    for name, tensor in full.items():
        parts = [part for prefix, part, _ in _numbers(name) if prefix in shortened]
        found[name] += map(_Part, parts)
        if name in reduced:
            found[name] += _dimensions(compared, name, tensor.shape, reduced[name].shape)
        elif not parts:
            raise _unexplained(compared.kind, name, "is gone with fewer of them")
    return {name: axes for name, axes in found.items() if axes}


def _dimensions(
    compared: Comparison, name: str, before: Iterable[int], after: Iterable[int]
) -> Iterator[_Dimension]:
    """The dimensions of a parameter that differ between the two models."""
    for dimension, (size, smaller) in enumerate(zip(before, after, strict=True)):
        if size == smaller:
            continue
        widths = compared.kind.widths(
            Resized(
                model=compared.full,
                name=name,
                dimension=dimension,
                before=size,
                after=smaller,
                number=compared.number,
                fewer=compared.fewer,
            )
        )
        if widths is None:
            raise _unexplained(
                compared.kind,
                name,
                f"has size {size} in dimension {dimension} with {compared.number} of them, and "
                f"{smaller} with {compared.fewer}",
            )
        yield _Dimension(dimension, widths)


def _unexplained(kind: Kind, name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{name!r} {what} ({kind.name}): emp-llm does not know how this model is made of them"
    )


def _numbers(name: str) -> Iterator[tuple[str, int, int]]:
    """The numbered parts of a name: what comes before the number, which part, and the number."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if match := _NUMBERED.fullmatch(part):
            yield ".".join([*parts[:at], match[1]]), at, int(match[2])


def _list_lengths(names: Iterable[str]) -> dict[str, int]:
    """How long each list of modules is, by what names of its items begin with."""
    lengths: dict[str, int] = {}
    for name in names:
        for prefix, _, number in _numbers(name):
            lengths[prefix] = max(lengths.get(prefix, 0), number + 1)
    return lengths


class _Tensor(NamedTuple):
    """A tensor of the checkpoint.

    Attributes:
        name: Its name.
        shape: Its shape.
        landing: The parameter that it is loaded into.
        stacked: Which part of its name numbers it among the tensors that the parameter is stacked
            of; None if there is none.
    """

    name: str
    shape: tuple[int, ...]
    landing: Landing
    stacked: int | None


def _stacked_parts(number: int, landings: Mapping[str, Landing | None]) -> dict[str, int]:
    """The part of each tensor's name that numbers it among those that are stacked in a parameter.

    Mixtral's ``experts.3.w1`` and ``experts.3.w3`` are two of many that make one parameter: the
    part that takes each number below that of experts, whatever the others are, is the one meant.
    """
    groups = defaultdict[str, list[str]](list)
    for name, landing in landings.items():
        if landing is not None and not landing.whole:
            groups[landing.name].append(name)
    found = {}
    for names in groups.values():
        numbers = defaultdict[tuple[int, str], set[int]](set)
        for name in names:
            for _, part, value in _numbers(name):
                numbers[part, _without(name, part)].add(value)
        for name in names:
            for _, part, _ in _numbers(name):
                if numbers[part, _without(name, part)] == set(range(number)):
                    found[name] = part
    return found


def _without(name: str, part: int) -> str:
    """A name without one of its parts, which still shows where that was."""
    parts = name.split(".")
    return ".".join([*parts[:part], "", *parts[part + 1 :]])


def _tensor_axes(
    tensor: _Tensor, axes: _Axes, sizes: Mapping[str, tuple[int, ...]], kind: KindName
) -> Iterator[_Part | _Dimension]:
    """The axes of a tensor, from those of the parameters that it is loaded into."""
    landing = tensor.landing
    for axis in axes[landing.name]:
        if isinstance(axis, _Part):
            yield _Part(_same_part(tensor.name, landing.name, axis.part))
            continue
        rank = len(sizes[landing.name])
        if len(tensor.shape) == rank - 1 and tensor.stacked is not None:
            if axis.dimension == 0:
                yield _Part(tensor.stacked)
                continue
            at = axis.dimension - 1
        elif len(tensor.shape) == rank:
            at = axis.dimension
        else:
            raise _not_matched(tensor, kind)
        if landing.flipped and at >= len(tensor.shape) - 2:
            at = 2 * len(tensor.shape) - 3 - at
        yield _Dimension(at, _tensor_widths(tensor, axis, axes, sizes, at, kind))


def _tensor_widths(
    tensor: _Tensor,
    axis: _Dimension,
    axes: _Axes,
    sizes: Mapping[str, tuple[int, ...]],
    at: int,
    kind: KindName,
) -> tuple[int, ...]:
    """The widths of a tensor's dimension, which may be one of several that are fused, or several.

    A parameter's own segments are those of the tensors that it is concatenated of.
    """
    size, dimension = tensor.shape[at], axis.dimension
    names = [tensor.landing.name, *tensor.landing.others]
    parts = [sizes[name][dimension] for name in names]
    if size == parts[0]:
        return axis.widths
    if len(names) > 1 and size == sum(parts):
        return tuple(width for name in names for width in _widths_of(axes, name, dimension))
    pieces, rest = divmod(parts[0], size)
    if not rest and len(set(axis.widths)) == 1 and len(axis.widths) % pieces == 0:
        return axis.widths[: len(axis.widths) // pieces]
    raise _not_matched(tensor, kind)


def _widths_of(axes: _Axes, name: str, dimension: int) -> Collection[int]:
    found = [
        axis.widths
        for axis in axes.get(name, ())
        if isinstance(axis, _Dimension) and axis.dimension == dimension
    ]
    return found[0] if found else ()


def _not_matched(tensor: _Tensor, kind: KindName) -> CheckpointError:
    return CheckpointError(
        f"{tensor.name!r}, of shape {list(tensor.shape)}, becomes a part of "
        f"{tensor.landing.name!r}, and emp-llm does not know which of its weights belong to which "
        f"of the {kind}: if other software wrote it, load it by transformers and save it anew"
    )


def _same_part(name: str, other: str, part: int) -> int:
    """The part of a tensor's name that is a numbered part of its parameter's name."""
    parts, others = name.split("."), other.split(".")
    same = [at for at, found in enumerate(parts) if found == others[part]]
    after = [at for at in same if at and part and parts[at - 1] == others[part - 1]]
    if not same:
        raise CheckpointError(
            f"{name!r} becomes {other!r}, whose number {others[part]} it does not have: load the "
            "checkpoint by transformers and save it anew"
        )
    return (after or same)[0]


def _with_holder(kind: KindName, tensor: _Tensor, axis: _Part | _Dimension) -> Axis:
    """An axis of a tensor, with what holds the structures."""
    block = tensor.landing.place.block
    of_block = None if block is None else block_in_checkpoint(tensor.name, block)
    if isinstance(axis, _Part):
        parts = tensor.name.split(".")
        inside = of_block is not None and axis.part >= len(of_block.split("."))
        holder = of_block if inside and of_block else ".".join(parts[: axis.part])
        return Axis(kind=kind, holder=holder, part=axis.part)
    if of_block is None:
        raise CheckpointError(
            f"{tensor.name!r} depends on the number of {kind} and belongs to no decoder block: "
            "emp-llm does not know how this model is made of them"
        )
    return Axis(kind=kind, holder=of_block, dimension=axis.dimension, widths=axis.widths)
