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
        Path, typer.Argument(metavar="FOLDER", help="A folder that prune or unpack wrote.")
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="The model that the folder was made from, itself a folder or a model of the Hub: "
            "decide every mask again and compare every weight.",
        ),
    ] = None,
    revision: Revision = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Prove that a folder is whole: hashes, structure, masks.

    A packed folder without emp_report.json, such as save_pretrained writes,
    has no hashes to compare with. Then only its structure is proved, the exit
    status is 0, and the answer says so. --against proves its weights, too.
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
    from emp_cli.tables import count, size, some

    tensors = f"{found['tensors']} tensors of {size(found['bytes'])}"
    rows = f"{count(found['rows'])} rows of {found['pruned_tensors']} pruned ones"
    kept = f"keep {count(found['kept'])} weights"
    if found["against"]:
        derived, repaired = found["masks_derived"], found["repaired_tensors"]
        just = "just what" if derived and not repaired else "nothing but what"
        others = f", {repaired} of them repaired, the others" if repaired else ""
        masks = "those that the rule keeps"
        if not derived:
            masks = "by masks that came from data and were not decided again"
        first = (
            f"{folder}: whole, and {just} pruning leaves of {found['against']}. {tensors}{others} "
            f"are the same bit for bit; {rows} {kept}, {masks}"
        )
    elif found["hashes"]:
        first = f"{folder}: whole. {tensors} have the hashes of the report; {rows} {kept}"
    else:
        first = (
            f"{folder}: sound in structure. {tensors}; {rows} {kept}. It has no emp_report.json, "
            "so there are no hashes to compare with: changed values would not show"
        )
    unchecked = found["other_files"]
    notes = [f"also there, and not checked: {some(unchecked)}"] if unchecked else []
    if found["unfinished_run"]:
        notes.append("beside it lies what a run that did not end has left (.emp-llm-unfinished)")
    return [first, *notes]
