"""``emp-llm push``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emp_cli.arguments import Json, Private
from emp_cli.console import INTERRUPTED, Clock, command, print_json, shown_progress

if TYPE_CHECKING:
    from emp_llm.entrypoints.push import Pushed

__all__ = ["push", "send", "show_sent"]


@command
def push(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="A folder that prune, pack, shrink or unpack wrote."),
    ],
    repo: Annotated[
        str,
        typer.Argument(metavar="REPO", help="USER/NAME on the Hub; created if it does not exist."),
    ],
    private: Private = False,
    revision: Annotated[
        str | None,
        typer.Option(metavar="BRANCH", help="The branch; created if it does not exist."),
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", metavar="", help="Open a pull request instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload a folder to the Hugging Face Hub; run it again to resume an upload."""
    clock = Clock()
    sent = send(folder, repo, private=private, revision=revision, create_pr=create_pr)
    if as_json:
        print_json({"folder": str(folder)} | sent | clock.to_dict())
        return
    show_sent(sent)


def send(
    folder: Path,
    repo: str,
    *,
    private: bool,
    revision: str | None = None,
    create_pr: bool = False,
) -> "Pushed":
    """Verify a folder and upload it, with progress on stderr; returns what `emp_llm.push` does."""
    from emp_cli.tables import size
    from emp_llm.entrypoints.push import check_folder, upload
    from emp_llm.runtime.quiet import hub_bars_on_terminals

    with shown_progress() as progress:
        model = check_folder(folder, progress=progress)
    if model.edited:
        names = ", ".join(model.edited)
        typer.echo(f"edited since they were written, uploaded as they are: {names}", err=True)
    typer.echo(f"uploading {size(model.nbytes)} to {repo}", err=True)
    try:
        with hub_bars_on_terminals():
            return upload(
                model, repo, private=private or None, revision=revision, create_pr=create_pr
            )
    except KeyboardInterrupt as interruption:
        typer.echo(
            f"interrupted: {folder} is whole and what has been sent is kept; "
            f"run emp-llm push {folder} {repo} to go on",
            err=True,
        )
        raise typer.Exit(INTERRUPTED) from interruption


def show_sent(sent: "Pushed") -> None:
    """Print where a model is, and how to load it."""
    from emp_cli.tables import size

    if sent["branch_made"]:
        typer.echo(f"{sent['repo_id']}: branch {sent['revision']} was not there and was made")
    typer.echo(f"{sent['url']}: {sent['files']} files, {size(sent['bytes'])}; load it with")
    typer.echo("\n".join(f"    {line}" for line in sent["load"]))
