"""``emp-llm push``."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from emp_cli.arguments import Json, Private
from emp_cli.console import INTERRUPTED, Clock, command, print_json, shown_progress

__all__ = ["push", "send", "show_sent"]


@command
def push(
    folder: Annotated[Path, typer.Argument(help="A folder that prune or unpack wrote.")],
    repo: Annotated[str, typer.Argument(help="USER/NAME on the Hub; made if it is not there.")],
    private: Private = False,
    revision: Annotated[
        str | None,
        typer.Option(help="The branch; made if it is not there.", show_default=False),
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Make a pull request instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload a folder to the Hugging Face Hub; run it again to go on where it broke off."""
    clock = Clock()
    sent = send(folder, repo, private=private, revision=revision, create_pr=create_pr)
    if as_json:
        print_json({"folder": str(folder)} | sent | clock.to_dict())
        return
    show_sent(sent)


def send(folder: Path, repo: str, *, private: bool, **options: Any) -> dict[str, Any]:  # noqa: ANN401
    """Verify a folder and upload it, with progress on stderr; returns what `emp_llm.push` does."""
    from emp_cli.tables import size
    from emp_llm.entrypoints.push import check_folder, upload

    with shown_progress() as progress:
        model = check_folder(folder, progress=progress)
    if model.edited:
        names = ", ".join(model.edited)
        typer.echo(f"edited since they were written, and taken as they are: {names}", err=True)
    typer.echo(f"uploading {size(model.nbytes)} to {repo}", err=True)
    try:
        with _bars_on_terminals():
            return upload(model, repo, private=private or None, **options)
    except KeyboardInterrupt as interruption:
        typer.echo(
            f"interrupted: {folder} is whole and what has been sent is kept; "
            f"run emp-llm push {folder} {repo} to go on",
            err=True,
        )
        raise typer.Exit(INTERRUPTED) from interruption


def show_sent(sent: dict[str, Any]) -> None:
    """Print where a model is, and how to load it."""
    from emp_cli.tables import size

    if sent["branch_made"]:
        typer.echo(f"{sent['repo_id']}: branch {sent['revision']} was not there and was made")
    typer.echo(f"{sent['url']}: {sent['files']} files, {size(sent['bytes'])}; load it with")
    typer.echo("\n".join(f"    {line}" for line in sent["load"]))


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Have huggingface_hub draw its bars on a terminal only, if nothing else is asked of it."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
