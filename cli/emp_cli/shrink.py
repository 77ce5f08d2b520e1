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
from emp_llm.shrink_options import BlockScore, ShrinkOptions, WidthRepair, WidthScore

__all__ = ["shrink"]


@command
def shrink(
    model: Model,
    out: Out,
    blocks: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Keep N decoder blocks, or as few as --max-loss-increase allows.",
        ),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="N|P%|auto",
            help="Keep N experts in each layer, remove P per cent of them, or keep as few as "
            "--max-loss-increase allows.",
        ),
    ] = None,
    neurons: Annotated[
        str | None,
        typer.Option(
            metavar="P%|N|auto",
            help="Remove P per cent of the neurons of each MLP, keep N of them, or as few as "
            "--max-loss-increase allows.",
        ),
    ] = None,
    kv_heads: Annotated[
        str | None,
        typer.Option(
            metavar="N|P%|auto",
            help="Keep N key-value heads in each layer, with their query heads, remove P per cent "
            "of them, or keep as few as --max-loss-increase allows.",
        ),
    ] = None,
    multiple: Annotated[
        int,
        typer.Option(metavar="N", help="Keep a multiple of N neurons, the nearest one to P%."),
    ] = 64,
    max_loss_increase: Annotated[
        float | None,
        typer.Option(
            metavar="PERCENT",
            help="With auto: how much the loss on the calibration text may rise, such as 5.",
        ),
    ] = None,
    block_score: Annotated[
        BlockScore,
        typer.Option(
            metavar="influence|loss|random",
            help="Which blocks go: those that change the direction of hidden states the least; one "
            "by one those without which the loss rises the least; or any. The first two need data.",
        ),
    ] = "influence",
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
            metavar="activation|obs|magnitude|random",
            help="How neurons and heads are ranked: by what they contribute to outputs, by the "
            "error without each when the others adapt, by weights alone, or at random. The first "
            "two need data.",
        ),
    ] = "activation",
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
    """Write a smaller ordinary model: fewer blocks, experts, neurons or heads.

    Every program loads the result that loads the source; prune and pack make it
    smaller still. inspect --structures shows the scores of experts first.

    If a run is interrupted or killed, the same command resumes it.
    """
    if blocks is experts is neurons is kv_heads is None:
        raise typer.BadParameter(
            "say what is to become fewer, such as 25%",
            param_hint="--blocks, --experts, --neurons, --kv-heads",
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
        blocks=blocks,
        experts=experts,
        neurons=neurons,
        kv_heads=kv_heads,
        multiple=multiple,
        max_loss_increase=max_loss_increase,
        block_score=block_score,
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
    from emp_cli.structures_view import show_shrunken
    from emp_cli.tables import written_line

    show_shrunken(report)
    nbytes = report["totals"]["bytes_before"]
    typer.echo(written_line(out, nbytes, clock.seconds, clock.peak_bytes))
