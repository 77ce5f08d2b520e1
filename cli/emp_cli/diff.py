"""``emp-llm diff``."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from emp_cli.arguments import Json, Threads
from emp_cli.console import Clock, command, print_json, shown_progress

if TYPE_CHECKING:
    from emp_llm.entrypoints.diff import Both, Difference, SideFields
    from emp_llm.verification.weight_differences import CountFields

__all__ = ["diff"]

_ITEMS = 4
"""Items of a list, such as a shape, that are shown."""


@command
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A folder, or a model of the Hub.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another folder or model.")],
    by_tensor: Annotated[
        bool,
        typer.Option(
            "--tensors", metavar="", help="A line for each tensor, not for each kind of layer."
        ),
    ] = False,
    exit_code: Annotated[
        bool,
        typer.Option(
            "--exit-code", metavar="", help="Exit with 1 unless all weights are the same."
        ),
    ] = False,
    revision_a: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of A.")
    ] = None,
    revision_b: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of B.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show how two checkpoints differ: masks, weights, bytes.

    Each may be packed, dense with zeros, or not pruned at all. The table lists
    the layers that differ. A weight is kept if it is not zero. overlap: weights
    that both keep, as a share of those that either keeps. changed: weights that
    both keep with different values. by: the largest such difference.

    The exit status is 0 whether they differ or not, as for git diff, unless
    --exit-code is given.
    """
    clock = Clock()
    import emp_llm

    with shown_progress() as progress:
        found = emp_llm.diff(
            a,
            b,
            revision_a=revision_a,
            revision_b=revision_b,
            threads=threads,
            progress=progress,
        )
    if as_json:
        print_json(found | clock.to_dict())
    else:
        _show(found, by_tensor=by_tensor)
    if exit_code and not found["same_weights"]:
        raise typer.Exit(1)


def _show(found: "Difference", *, by_tensor: bool) -> None:
    from emp_cli.tables import show
    from emp_llm.messages import message_line

    typer.echo(message_line(f"A  {_side(found['a'])}"))
    typer.echo(message_line(f"B  {_side(found['b'])}"))
    header = ("layer", "kept A", "kept B", "overlap", "changed", "by", "bytes A", "bytes B")
    parts: Mapping[str, CountFields] = found["tensors"] if by_tensor else found["kinds"]
    differing = {name: part for name, part in parts.items() if part["same"] < part["tensors"]}
    rows = {**differing, "all tensors": found["totals"]}
    show("", header, [(name, *_cells(part)) for name, part in rows.items()])
    for line in _lines(found):
        typer.echo(message_line(line))


def _side(side: "SideFields") -> str:
    from emp_cli.tables import size
    from emp_llm.options import NO_TARGETS

    rule = side["rule"]
    made = f"{side['format']}, no rule known"
    if rule and rule["targets"] == NO_TARGETS:
        made = "packed without loss" if side["format"] == "packed" else "dense, nothing pruned"
    elif rule:
        made = f"{side['format']}, β = {rule['beta']:g}, {rule['granularity']} groups"
    return f"{side['model']}  {made}, {side['tensors']} tensors, {size(side['bytes'])}"


def _cells(counts: "CountFields") -> tuple[str, ...]:
    from emp_cli.tables import count, size

    weights = max(counts["weights"], 1)
    return (
        f"{counts['kept_a'] / weights:.2%}",
        f"{counts['kept_b'] / weights:.2%}",
        f"{counts['overlap']:.4f}",
        count(counts["changed"]),
        f"{counts['largest_change']:.2g}",
        size(counts["bytes_a"]),
        size(counts["bytes_b"]),
    )


def _lines(found: "Difference") -> Iterator[str]:
    """What the table does not show, a line each, and the conclusion."""
    from emp_cli.tables import some

    for side, names in (("A", found["only_in_a"]), ("B", found["only_in_b"])):
        if names:
            yield f"only in {side}: {some(names)}"
    if found["other_kind"]:
        pairs = [f"{name} {_pair(kinds)}" for name, kinds in found["other_kind"].items()]
        yield f"of other dtype or shape: {some(pairs)}"
    if found["a"]["rule"] and found["b"]["rule"] and found["rule"]:
        yield f"rule: {some([f'{key} {_pair(both)}' for key, both in found['rule'].items()])}"
    if found["config"]:
        pairs = [f"{key} {_pair(both)}" for key, both in found["config"].items()]
        yield f"config.json: {some(pairs)}"
    for side, fields in (("A", found["a"]), ("B", found["b"])):
        if fields["by_source"]:
            yield f"{side} is smaller: blocks and experts have the numbers of its source here"
        elif fields["renumbered"]:
            yield f"{side} is smaller: blocks and experts have their new numbers here"
    yield _conclusion(found)


def _pair(both: "Both") -> str:
    return " / ".join(map(_short, (both["a"], both["b"])))


def _short(value: object) -> str:
    """A value, or of a long list how many items it has."""
    return f"{len(value)} items" if isinstance(value, list) and len(value) > _ITEMS else f"{value}"


def _conclusion(found: "Difference") -> str:
    from emp_cli.tables import count

    totals = found["totals"]
    if found["same_weights"]:
        return f"the same weights: all {totals['tensors']} tensors, bit for bit"
    masks = "the same masks" if totals["same_masks"] == totals["tensors"] else "other masks"
    return (
        f"other weights: {totals['same']} of {totals['tensors']} tensors are the same; {masks}: B "
        f"keeps {totals['a_in_b']:.2%} of what A keeps, A keeps {totals['b_in_a']:.2%} of what B "
        f"keeps; {count(totals['changed'])} weights that both keep have changed"
    )
