"""The app and its subcommands. Nothing heavy is imported before a command needs it."""

from typing import Annotated

import typer

from emp_cli.compare import compare
from emp_cli.diff import diff
from emp_cli.eval import evaluate
from emp_cli.generate import generate
from emp_cli.inspect import inspect
from emp_cli.pack import pack
from emp_cli.prune import prune
from emp_cli.push import push
from emp_cli.report import report
from emp_cli.shrink import shrink
from emp_cli.unpack import unpack
from emp_cli.verify import verify

__all__ = ["app"]

app = typer.Typer(
    help="Effective Model Pruning: how many weights to keep is computed from the weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    *(prune, pack, shrink, inspect, report, unpack, verify, diff, push, generate, compare),
):
    app.command()(command)
app.command("eval")(evaluate)


def _show_version(wanted: bool) -> None:
    if wanted:
        from emp_llm._version import __version__

        typer.echo(f"emp-llm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar="",
            help="Show the version.",
            callback=_show_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    pass
