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
from emp_llm.shrink_options import ShrinkOptions, WidthRepair, WidthScore

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
    neurons: Annotated[
        str | None,
        typer.Option(
            metavar="P%|N",
            help="Remove P per cent of the neurons of each MLP, or keep N of them.",
        ),
    ] = None,
    kv_heads: Annotated[
        str | None,
        typer.Option(
            metavar="N|P%",
            help="Keep N key-value heads in each layer, with their query heads, or remove P per "
            "cent of them.",
        ),
    ] = None,
    multiple: Annotated[
        int,
        typer.Option(metavar="N", help="Keep a multiple of N neurons, the nearest one to P%."),
    ] = 64,
    score: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How experts are ranked: aimer or norm, from their weights alone; reap, from "
            "data; random; or your own as module:Class.",
        ),
    ] = "aimer",
    width_score: Annotated[
        WidthScore,
        typer.Option(
            metavar="obs|activation|magnitude|random",
            help="How neurons and heads are ranked: by the error without each when the others "
            "adapt, by what they contribute to outputs, by weights alone, or at random. The first "
            "two need data.",
        ),
    ] = "obs",
    repair: Annotated[
        WidthRepair,
        typer.Option(
            metavar="obs|none",
            help="Fit the matrices that read neurons and heads to the dense model's outputs, by "
            "least squares on data, or not.",
        ),
    ] = "obs",
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
    """Write a smaller ordinary model: fewer experts, neurons or heads in each layer.

    Every program loads the result that loads the source; prune and pack make it
    smaller still. inspect --structures shows the scores first.

    If a run is interrupted or killed, the same command resumes it.
    """
    if experts is neurons is kv_heads is None:
        raise typer.BadParameter(
            "say what is to become fewer, such as 25%",
            param_hint="--experts, --neurons, --kv-heads",
        )
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
    options = ShrinkOptions(
        experts=experts,
        neurons=neurons,
        kv_heads=kv_heads,
        multiple=multiple,
        score=score,
        width_score=width_score,
        repair=repair,
        calibration=data,
    )
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
