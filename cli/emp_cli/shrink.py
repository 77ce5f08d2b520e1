"""``emp-llm shrink``."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from emp_cli.arguments import (
    Calibration,
    Device,
    Json,
    Length,
    Model,
    Multiple,
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

_UNDRAWN = ("aimer", "reap", "norm")
"""Scores of experts that draw no numbers."""


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
    multiple: Multiple = None,
    max_loss_increase: Annotated[
        float | None,
        typer.Option(
            metavar="PERCENT",
            help="With auto: how much the loss on the calibration text may rise, such as 5.",
        ),
    ] = None,
    block_score: Annotated[
        BlockScore | None,
        typer.Option(
            metavar="influence|loss|random",
            help="Which blocks go: those that change the direction of hidden states the least; one "
            "by one those without which the loss rises the least; or any. The first two need data. "
            "Default: influence.",
        ),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How experts are ranked: aimer or norm, from their weights alone; reap, from "
            "data; random; or your own as module:Class. Default: aimer.",
        ),
    ] = None,
    width_score: Annotated[
        WidthScore | None,
        typer.Option(
            metavar="activation|obs|magnitude|random",
            help="How neurons and heads are ranked: by what they contribute to outputs, by the "
            "error without each when the others adapt, by weights alone, or at random. The first "
            "two need data. Default: activation.",
        ),
    ] = None,
    repair: Annotated[
        WidthRepair | None,
        typer.Option(
            metavar="obs|none",
            help="Fit the matrices that read neurons and heads to the dense model's outputs, by "
            "least squares on data, or not. Default: obs.",
        ),
    ] = None,
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
            "say what is to become fewer, such as --experts 25%",
            param_hint="--blocks, --experts, --neurons, --kv-heads",
        )
    clock = Clock()
    ranked: dict[str, Any] = {
        "block_score": block_score,
        "score": score,
        "width_score": width_score,
        "repair": repair,
        "multiple": multiple,
    }
    # drawn are samples, random scores, and what an expert score of the user's own may ask for
    draws = "random" in (block_score, width_score) or score not in (None, *_UNDRAWN)
    others = {"seed": seed, "device": None if device == "auto" else device}
    _check_used(
        ranked | others,
        {
            "block_score": (blocks, "--blocks"),
            "score": (experts, "--experts"),
            "width_score": (neurons or kv_heads, "--neurons and --kv-heads"),
            "repair": (neurons or kv_heads, "--neurons and --kv-heads"),
            "multiple": (neurons, "--neurons"),
            "seed": (calibration or draws or None, "--calibration or a random score"),
            "device": (calibration, "--calibration"),
        },
    )
    data = calibration_options(
        score or ShrinkOptions.score,
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
        max_loss_increase=max_loss_increase,
        calibration=data,
        **{name: value for name, value in ranked.items() if value is not None},
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


def _check_used(given: Mapping[str, object], users: Mapping[str, tuple[object, str]]) -> None:
    """Refuse an option that changes nothing, since what would use it is not asked for.

    Args:
        given: Values of options; None where one is not given.
        users: For each of them, what has to be given too, and how that is called.
    """
    for name, (user, called) in users.items():
        if given[name] is not None and user is None:
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"goes with {called} only", param_hint=option)
