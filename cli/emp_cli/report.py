"""``emp-llm report``."""

from typing import Annotated

import typer

from emp_cli.arguments import Html, Json, Png, Revision
from emp_cli.console import Clock, command, print_json
from emp_cli.pictures import check_pictures, write_pictures

__all__ = ["report"]


@command
def report(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder that prune, pack or shrink wrote, or such a model of the Hub.",
        ),
    ],
    html: Html = None,
    png: Png = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Show what prune, pack or shrink did to a model, from its report; reads no weights."""
    clock = Clock()
    check_pictures(html, png)
    from emp_llm.entrypoints.report import find_report, find_shrink_report

    if (smaller := find_shrink_report(model, revision=revision)) is not None:
        if html or png:
            hint = "--html" if html else "--png"
            raise typer.BadParameter("shows what was pruned, and nothing was", param_hint=hint)
        if as_json:
            print_json({**smaller} | clock.to_dict())
            return
        from emp_cli.structures_view import show_shrunken

        show_shrunken(smaller)
        return
    found = find_report(model, revision=revision)
    written = write_pictures(found, html, png)
    from emp_cli.inspect_view import report_with_parts, show_report

    if as_json:
        print_json(report_with_parts(found) | clock.to_dict())
        return
    show_report(found)
    for line in written:
        typer.echo(line)
