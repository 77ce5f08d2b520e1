"""``emp-llm pack``."""

import typer

from emp_cli.arguments import DiscardSource, Json, Model, Out, Overwrite, Revision, Threads
from emp_cli.console import Clock, command, leads_team, print_json, shown_progress

__all__ = ["pack"]


@command
def pack(
    model: Model,
    out: Out,
    revision: Revision = None,
    discard_source: DiscardSource = False,
    overwrite: Overwrite = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Pack a checkpoint without pruning it: smaller, and every weight keeps every bit.

    unpack gives an ordinary checkpoint again, with the source's tensors;
    verify --against SOURCE checks that they are the same.

    If a run is interrupted or killed, the same command resumes it. Several
    processes share the work if torchrun, accelerate launch or srun starts them.
    """
    clock = Clock()
    leads = leads_team()
    import emp_llm

    with shown_progress(leads) as progress:
        report = emp_llm.pack(
            model,
            out,
            revision=revision,
            discard_source=discard_source,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
            distributed=True,
        )
    if not leads:  # the first process reports what all have done
        return
    written = clock.to_dict()
    if as_json:
        summary = {name: part for name, part in report.items() if name != "tensors"}
        print_json({"out": str(out)} | summary | written)
        return
    from emp_cli.tables import file_lines, totals_line, written_line

    for line in file_lines(report.get("carried"), report.get("left_behind")):
        typer.echo(line)
    typer.echo(totals_line(report))
    nbytes = report["totals"]["model"]["bytes_before"]
    typer.echo(written_line(out, nbytes, clock.seconds, clock.peak_bytes))
