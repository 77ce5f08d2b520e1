"""``emp-llm verify``."""

from pathlib import Path
from typing import Annotated

import typer

from emp_cli.arguments import Json, Threads
from emp_cli.console import Clock, command, print_json, shown_progress

__all__ = ["verify"]


@command
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that prune or unpack wrote.")],
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Prove a written folder whole: hashes, structure, masks."""
    clock = Clock()
    import emp_llm

    with shown_progress() as progress:
        found = emp_llm.verify(folder, threads=threads, progress=progress)
    if as_json:
        print_json({"folder": str(folder), "whole": True} | found | clock.to_dict())
        return
    from emp_cli.tables import count, size

    typer.echo(
        f"{folder}: whole. {found['tensors']} tensors of {size(found['bytes'])} have the hashes of "
        f"the report; {count(found['rows'])} rows of {found['pruned_tensors']} pruned ones keep "
        f"{count(found['kept'])} weights"
    )
