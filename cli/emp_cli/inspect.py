"""``emp-llm inspect``."""

from collections.abc import Mapping
from typing import Annotated

import typer

from emp_cli.arguments import (
    Beta,
    Calibration,
    GranularityOption,
    Html,
    Ignore,
    Json,
    Length,
    Model,
    Png,
    RestOption,
    Revision,
    Samples,
    Seed,
    Targets,
    TargetSparsity,
    Threads,
)
from emp_cli.console import Clock, command, print_json, shown_progress
from emp_cli.option_parsing import beta_options, calibration_options
from emp_cli.pictures import check_pictures, write_pictures
from emp_llm.options import CalibrationOptions, PruneOptions

__all__ = ["inspect"]

_SCORE = "aimer"


@command
def inspect(
    model: Model,
    beta: Beta = None,
    target_sparsity: TargetSparsity = None,
    granularity: GranularityOption = "row",
    targets: Targets = "mlp",
    ignore: Ignore = None,
    rest: RestOption = "packed",
    revision: Revision = None,
    download: Annotated[
        bool,
        typer.Option(
            "--download",
            metavar="",
            help="Download a model of the Hub into its cache, for a prune that follows. "
            "Otherwise only what would be packed is read, and nothing is kept.",
        ),
    ] = False,
    structures: Annotated[
        bool,
        typer.Option(
            "--structures",
            metavar="",
            help="Show instead what shrink can make fewer, with scores and N_eff: of experts, and "
            "with --calibration of blocks, neurons and heads.",
        ),
    ] = False,
    score: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="With --structures: what experts are ranked by, as for shrink; aimer needs no "
            "data, reap does.",
        ),
    ] = _SCORE,
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    threads: Threads = None,
    html: Html = None,
    png: Png = None,
    as_json: Json = False,
) -> None:
    """Show what prune would do, and why it leaves the other tensors; writes no model."""
    clock = Clock()
    data = calibration_options(
        score,
        calibration,
        seed,
        sequential=True,
        samples=samples,
        length=length,
        device="auto",
        trust_remote_code=False,
    )
    if structures:
        _check_alone(
            {"--beta": beta, "--target-sparsity": target_sparsity, "--html": html, "--png": png}
        )
        _show_structures(model, score, data, revision, threads, clock, as_json=as_json)
        return
    if data is not None or score != _SCORE:
        raise typer.BadParameter(
            "goes with --structures only", param_hint="--score" if data is None else "--calibration"
        )
    options = PruneOptions(
        granularity=granularity,
        targets=targets,
        ignore=tuple(ignore or ()),
        rest=rest,
        **beta_options(beta, target_sparsity, None),
    )
    check_pictures(html, png)
    import emp_llm

    with shown_progress() as progress:
        report = emp_llm.inspect(
            model,
            options,
            revision=revision,
            download=download,
            threads=threads,
            progress=progress,
        )
    written = write_pictures(report, html, png, model=model)
    from emp_cli.inspect_view import report_with_parts, show_report

    if as_json:
        print_json(report_with_parts(report) | clock.to_dict())
        return
    show_report(report)
    for line in written:
        typer.echo(line)


def _check_alone(others: Mapping[str, object]) -> None:
    for name, value in others.items():
        if value is not None:
            raise typer.BadParameter("does not go with --structures", param_hint=name)


def _show_structures(
    model: str,
    score: str,
    data: CalibrationOptions | None,
    revision: str | None,
    threads: int | None,
    clock: Clock,
    *,
    as_json: bool,
) -> None:
    import emp_llm
    from emp_cli.structures_view import show_structures

    with shown_progress() as progress:
        report = emp_llm.inspect_structures(
            model,
            score=score,
            calibration=data,
            revision=revision,
            threads=threads,
            progress=progress,
        )
    if as_json:
        print_json({**report} | clock.to_dict())
    else:
        show_structures(report)
