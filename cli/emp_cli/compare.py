"""``emp-llm compare``."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

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
from emp_cli.compare_view import show_comparison, show_experts
from emp_cli.console import Clock, command, print_json, shown_progress
from emp_cli.option_parsing import calibration_options

if TYPE_CHECKING:
    from emp_llm.comparison.costs import Comparison
    from emp_llm.comparison.expert_costs import ExpertsComparison

__all__ = ["compare"]

_Compared = TypeVar("_Compared", "Comparison", "ExpertsComparison")

_BETAS = "0.5,0.75,1,1.25"


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
    ] = _BETAS,
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Instead, compare scores of experts: how many stay in each layer, separated by "
            "commas; numbers, shares that are removed such as 25%, or n_eff.",
        ),
    ] = None,
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

    With --calibration, also that of scores and repair from data. With --experts,
    that of a mixture with fewer experts, by each score and at random.
    """
    clock = Clock()
    if experts is not None and (betas, targets, ignore, plot) != (_BETAS, "mlp", None, None):
        raise typer.BadParameter(
            "goes without --betas, --targets, --ignore and --plot", param_hint="--experts"
        )
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

    common: dict[str, Any] = {
        "context": context,
        "protocol": protocol,
        "dtype": dtype,
        "device": device,
        "seed": seed,
        "random_runs": random_runs,
        "calibration": data,
        "trust_remote_code": trust_remote_code,
        "revision": revision,
        "save": save,
    }
    predicted = read_text(text, protocol=protocol)
    if experts is not None:
        amounts = [part.strip() for part in experts.split(",")]
        with shown_progress() as progress:
            of_experts = emp_llm.compare_experts(
                model, predicted, experts=amounts, progress=progress, **common
            )
        _print(of_experts, save, clock, as_json, show_experts)
        return
    with shown_progress() as progress:
        found = emp_llm.compare(
            model,
            predicted,
            betas=multipliers,
            targets=targets,
            ignore=tuple(ignore or ()),
            progress=progress,
            **common,
        )
    if plot is not None:
        from emp_llm.comparison.plot import save_plot

        save_plot(found, plot)
    _print(found, save, clock, as_json, show_comparison)


def _print(
    found: _Compared,
    save: Path | None,
    clock: Clock,
    as_json: bool,
    show: Callable[[_Compared], None],
) -> None:
    if found.taken:
        typer.echo(f"{found.taken} of {len(found.costs)} rows were in {save} already", err=True)
    if as_json:
        print_json(found.to_dict() | clock.to_dict())
    else:
        show(found)


def _numbers(betas: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in betas.split(","))
    except ValueError as error:
        raise typer.BadParameter(
            f"{betas!r} is not a list of numbers such as 0.5,1", param_hint="--betas"
        ) from error
