"""``emp-llm prune``."""

from typing import Annotated

import typer

from emp_cli.arguments import (
    Beta,
    GranularityOption,
    Ignore,
    Json,
    Model,
    Out,
    Overwrite,
    Revision,
    Targets,
    Threads,
)
from emp_cli.console import Clock, command, print_json, shown_progress
from emp_llm.options import OutputFormat, PruneOptions

__all__ = ["prune"]


@command
def prune(
    model: Model,
    out: Out,
    beta: Beta = 1.0,
    granularity: GranularityOption = "row",
    targets: Targets = "mlp",
    ignore: Ignore = None,
    output_format: Annotated[
        OutputFormat,
        typer.Option("--format", help="Smaller, or an ordinary checkpoint with zeros in it."),
    ] = "packed",
    revision: Revision = None,
    overwrite: Overwrite = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Prune a checkpoint and write the result, smaller."""
    clock = Clock()
    options = PruneOptions(
        beta=beta,
        granularity=granularity,
        targets=targets,
        ignore=tuple(ignore or ()),
        output_format=output_format,
    )
    import emp_llm

    with shown_progress() as progress:
        report = emp_llm.prune(
            model,
            out,
            options,
            revision=revision,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )
    if as_json:
        from emp_llm.report import kinds

        summary = {name: part for name, part in report.items() if name != "tensors"}
        print_json({"out": str(out)} | summary | {"kinds": kinds(report)} | clock.to_dict())
        return
    from emp_cli.tables import pruned_kinds, size, totals_line

    pruned_kinds(report)
    rate = report["totals"]["model"]["bytes_before"] / clock.seconds
    typer.echo(totals_line(report))
    typer.echo(
        f"{out}: written in {clock.seconds:.1f} s ({size(int(rate))}/s), "
        f"peak memory {size(clock.peak_bytes)}"
    )
