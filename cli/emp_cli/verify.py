"""``emp-llm verify``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emp_cli.arguments import Json, Revision, Threads
from emp_cli.console import Clock, command, print_json, shown_progress

if TYPE_CHECKING:
    from emp_llm.entrypoints.verify import Verified

__all__ = ["verify"]


@command
def verify(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="What prune, pack, shrink or unpack wrote."),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="The model that the folder was made from, a folder or a model of the Hub: compute "
            "every mask again and compare every weight.",
        ),
    ] = None,
    revision: Revision = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Check that a folder is whole: hashes, structure, masks.

    A packed folder without emp_report.json, such as save_pretrained writes,
    has no hashes to compare with. Then only its structure is checked; the
    output says so, and the exit status is 0. --against checks its weights, too.
    """
    clock = Clock()
    import emp_llm

    with shown_progress() as progress:
        found = emp_llm.verify(
            folder, against=against, revision=revision, threads=threads, progress=progress
        )
    if as_json:
        whole = found["hashes"] or against is not None
        print_json({"folder": str(folder), "whole": whole} | found | clock.to_dict())
        return
    from emp_llm.messages import message_line

    for line in _lines(folder, found):
        typer.echo(message_line(line))


def _lines(folder: Path, found: "Verified") -> list[str]:
    from emp_cli.tables import count, size

    tensors = f"{found['tensors']} tensors ({size(found['bytes'])})"
    if found["structures"] is not None:
        return [*_shrunken_lines(folder, found, tensors), *_notes(found)]
    pruned = (
        "none of them is pruned"
        if not found["pruned_tensors"]
        else f"{found['pruned_tensors']} pruned tensors keep {count(found['kept'])} weights "
        f"in {count(found['rows'])} rows"
    )
    if found["against"] and not found["pruned_tensors"]:
        first = f"{folder}: whole. {tensors} are those of {found['against']}, bit for bit"
    elif found["against"]:
        derived, repaired = found["masks_derived"], found["repaired_tensors"]
        as_pruned = "exactly" if derived and not repaired else "consistent with"
        others = f", {repaired} of them repaired: the others" if repaired else ""
        masks = "their masks are those of the rule"
        if not derived:
            masks = "their masks came from data or an allocation, and were not computed again"
        first = (
            f"{folder}: whole, and {as_pruned} what pruning {found['against']} gives. "
            f"{tensors}{others} are the same bit for bit; {pruned}; {masks}"
        )
    elif found["hashes"]:
        first = f"{folder}: whole. {tensors} have the hashes of the report; {pruned}"
    else:
        first = (
            f"{folder}: valid in structure. {tensors}; {pruned}. It has no emp_report.json, "
            "so there are no hashes to compare with: changed values would not show"
        )
    return [first, *_notes(found)]


def _shrunken_lines(folder: Path, found: "Verified", tensors: str) -> list[str]:
    """What was found of a folder that shrink wrote."""
    structures = (found["structures"] or {}).items()
    stay = "; ".join(f"{kept} of {number} {kind} stay" for kind, (kept, number) in structures)
    if not found["against"]:
        return [f"{folder}: whole. {tensors} have the hashes of the report; {stay}"]
    repaired = found["repaired_tensors"]
    others = f", {repaired} of them repaired: the others" if repaired else ""
    return [
        f"{folder}: whole, and what shrinking {found['against']} gives. {tensors}{others} are, bit "
        f"for bit, what stays of the source's; {stay}"
    ]


def _notes(found: "Verified") -> list[str]:
    from emp_cli.tables import some

    unchecked = found["other_files"]
    notes = [f"other files, not checked: {some(unchecked)}"] if unchecked else []
    if found["unfinished_run"]:
        notes.append("it also holds the files of an unfinished run (.emp-llm-unfinished)")
    return notes
