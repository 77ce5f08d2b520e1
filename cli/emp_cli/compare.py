"""``emp-llm compare``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emp_cli.arguments import (
    Calibration,
    Context,
    Device,
    Dtype,
    Ignore,
    Json,
    Length,
    Model,
    Protocol,
    Revision,
    Samples,
    Targets,
    TrustRemoteCode,
)
from emp_cli.console import Clock, command, print_json, shown_progress
from emp_cli.option_parsing import calibration_options

if TYPE_CHECKING:
    from emp_llm.comparison.costs import Comparison, Cost

__all__ = ["compare"]

_NAMES = {
    "dense": "dense",
    "emp": "EMP",
    "magnitude-row": "uniform rows",
    "magnitude-layer": "uniform layers",
    "pq-index": "PQ index",
    "random": "random",
    "wanda": "wanda",
    "obs": "obs",
    "emp-repaired": "EMP, repaired",
    "obs-repaired": "obs, repaired",
}


@command
def compare(
    model: Model,
    text: Annotated[
        str,
        typer.Option(
            "--perplexity",
            metavar="TEXT",
            help="The text to predict: wikitext2, ptb, c4, a file, or "
            "DATASET[:CONFIG[:SPLIT]] of the Hub.",
            show_default=False,
        ),
    ],
    betas: Annotated[
        str, typer.Option(metavar="LIST", help="Values of β, separated by commas.")
    ] = "0.5,0.75,1,1.25",
    targets: Targets = "mlp",
    ignore: Ignore = None,
    protocol: Protocol = "paper",
    context: Context = 2048,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Seed of the first random run, and of the calibration."
        ),
    ] = 0,
    random_runs: Annotated[
        int, typer.Option(min=0, metavar="N", help="Random runs for each β; 0 for none.")
    ] = 3,
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Save each row when it is measured; the same command goes on from there.",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Also draw the result.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure the perplexity of EMP, and of other ways to keep the same number of weights.

    With --calibration, also that of scores and repair from data.
    """
    clock = Clock()
    multipliers = _numbers(betas)
    if plot is not None:
        from emp_llm.comparison.plot import check_plot

        check_plot(plot)
    data = calibration_options(
        "obs",
        calibration,
        None if calibration is None else seed,
        sequential=True,
        samples=samples,
        length=length,
        device=device,
        trust_remote_code=trust_remote_code and calibration is not None,
    )
    import emp_llm
    from emp_llm.texts.texts import read_text

    with shown_progress() as progress:
        found = emp_llm.compare(
            model,
            read_text(text, protocol=protocol),
            betas=multipliers,
            targets=targets,
            ignore=tuple(ignore or ()),
            context=context,
            protocol=protocol,
            dtype=dtype,
            device=device,
            seed=seed,
            random_runs=random_runs,
            calibration=data,
            trust_remote_code=trust_remote_code,
            revision=revision,
            save=save,
            progress=progress,
        )
    if plot is not None:
        from emp_llm.comparison.plot import save_plot

        save_plot(found, plot)
    if found.taken:
        typer.echo(f"{found.taken} of {len(found.costs)} rows were in {save} already", err=True)
    if as_json:
        print_json(found.to_dict() | clock.to_dict())
        return
    _show(found)
    typer.echo(_conclusion(found))


def _numbers(betas: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in betas.split(","))
    except ValueError as error:
        raise typer.BadParameter(
            f"{betas!r} is not a list of numbers such as 0.5,1", param_hint="--betas"
        ) from error


def _show(found: "Comparison") -> None:
    from emp_cli.tables import show

    header = ("β", "method", "sparsity", "perplexity", "above dense", "above EMP")
    settings = found.settings
    title = (
        f"{found.source['model']}  {settings['text']} in windows of {settings['context']}, "
        f"protocol {settings['protocol']}"
    )
    show(title, header, [_row(found, cost) for cost in found.costs], left=2)


def _row(found: "Comparison", cost: "Cost") -> tuple[str, ...]:
    leads = cost.beta is not None and cost.method == "emp"
    return (
        f"{cost.beta:g}" if leads else "",
        _NAMES[cost.method],
        f"{cost.sparsity:.2%}",
        " ± ".join(_number(n) for n in (cost.perplexity, cost.deviation) if n is not None),
        "" if cost.beta is None else _share(cost.above(found.dense)),
        "" if cost.beta is None or leads else _share(cost.above(found.emp(cost.beta))),
    )


def _number(number: float) -> str:
    return f"{number:,.2f}" if number < 1000 else f"{number:,.0f}"


def _share(share: float) -> str:
    return f"{share:+.2%}" if share < 10 else f"× {share + 1:,.0f}"


def _conclusion(found: "Comparison") -> str:
    """At how many β each control that ranks by magnitude is worse than EMP, a line each."""
    lines = []
    for method in ("magnitude-row", "magnitude-layer", "pq-index"):
        costs = [cost for cost in found.costs if cost.method == method]
        worse = sum(cost.above(found.emp(cost.beta)) > 0 for cost in costs)
        lines.append(f"EMP beats {_NAMES[method]} at {worse} of {len(costs)} β")
    return "\n".join(lines)
