"""``emp-llm shrink``."""

from typing import Annotated

import typer

from emp_cli.arguments import (
    Calibration,
    Device,
    Json,
    Length,
    Model,
    Out,
    Overwrite,
    Revision,
    Samples,
    Seed,
    Threads,
    TrustRemoteCode,
)
from emp_cli.console import Clock, command, print_json, shown_progress
from emp_cli.option_parsing import calibration_options
from emp_llm.shrink_options import ShrinkOptions

__all__ = ["shrink"]


@command
def shrink(
    model: Model,
    out: Out,
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="N|P%",
            help="Keep N experts in each layer, or remove P per cent of them.",
        ),
    ] = None,
    score: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How experts are ranked: aimer or norm, from their weights alone; reap, from "
            "data; random; or your own as module:Class.",
        ),
    ] = "aimer",
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    overwrite: Overwrite = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Write a smaller ordinary model with fewer experts in each layer.

    Every program loads the result that loads the source; prune and pack make it
    smaller still. inspect --structures shows the scores first.

    If a run is interrupted or killed, the same command resumes it.
    """
    if experts is None:
        raise typer.BadParameter("say what is to become fewer, such as 25%", param_hint="--experts")
    clock = Clock()
    data = calibration_options(
        score,
        calibration,
        seed,
        sequential=True,
        samples=samples,
        length=length,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    options = ShrinkOptions(experts=experts, score=score, calibration=data)
    import emp_llm

    with shown_progress() as progress:
        report = emp_llm.shrink(
            model,
            out,
            options,
            revision=revision,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )
    if as_json:
        summary = {name: part for name, part in report.items() if name != "tensors"}
        print_json({"out": str(out)} | summary | clock.to_dict())
        return
    from emp_cli.structures_view import show_structures, shrunken_lines
    from emp_cli.tables import file_lines

    show_structures(report)
    for line in (
        *file_lines(report["carried"], report["left_behind"]),
        *shrunken_lines(out, report, clock.seconds, clock.peak_bytes),
    ):
        typer.echo(line)
