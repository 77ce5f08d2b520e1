"""``emp-llm unpack``."""

import typer

from emp_cli.arguments import Json, KernelDevice, Model, Out, Overwrite, Revision, Threads
from emp_cli.console import Clock, command, print_json, shown_progress

__all__ = ["unpack"]


@command
def unpack(
    model: Model,
    out: Out,
    revision: Revision = None,
    overwrite: Overwrite = False,
    device: KernelDevice = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Turn a packed checkpoint into an ordinary one with the same weights, bit for bit."""
    clock = Clock()
    import emp_llm

    with shown_progress() as progress:
        summary = emp_llm.unpack(
            model,
            out,
            revision=revision,
            overwrite=overwrite,
            device=device,
            threads=threads,
            progress=progress,
        )
    if as_json:
        print_json({"out": str(out)} | summary | clock.to_dict())
        return
    from emp_cli.tables import file_lines, size

    for line in file_lines(summary["carried"], summary["left_behind"]):
        typer.echo(line)
    typer.echo(
        f"{out}: {size(summary['bytes_before'])} → {size(summary['bytes_after'])}, "
        f"{summary['packed_tensors']} of {summary['tensors']} tensors unpacked in "
        f"{clock.seconds:.1f} s"
    )
