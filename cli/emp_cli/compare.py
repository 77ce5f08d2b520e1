"""``emp-llm compare``."""

from collections.abc import Callable, Sequence
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
    Multiple,
    Protocol,
    Revision,
    Samples,
    Targets,
    TrustRemoteCode,
)
from emp_cli.compare_view import show_comparison, show_structures_compared
from emp_cli.console import Clock, command, print_json, shown_progress
from emp_cli.option_parsing import calibration_options

if TYPE_CHECKING:
    from emp_llm.comparison.costs import Comparison
    from emp_llm.comparison.structures_costs import StructuresComparison

__all__ = ["compare"]

_Compared = TypeVar("_Compared", "Comparison", "StructuresComparison")

_BETAS = "0.5,0.75,1,1.25"
_STRUCTURES = "Fewer structures"


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
            rich_help_panel=_STRUCTURES,
        ),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Instead, compare scores of decoder blocks: how many stay.",
            rich_help_panel=_STRUCTURES,
        ),
    ] = None,
    neurons: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Instead, compare scores of neurons: how many stay in each MLP, or shares.",
            rich_help_panel=_STRUCTURES,
        ),
    ] = None,
    kv_heads: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Instead, compare scores of key-value heads: how many stay in each layer, or "
            "shares.",
            rich_help_panel=_STRUCTURES,
        ),
    ] = None,
    scores: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Only these scores of structures, separated by commas.",
            rich_help_panel=_STRUCTURES,
        ),
    ] = None,
    multiple: Multiple = None,
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
        int, typer.Option(min=0, metavar="N", help="Random runs for each β, or number; 0 for none.")
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

    With --calibration, also that of scores and repair from data. With --blocks,
    --experts, --neurons or --kv-heads, that of a model with fewer of these, by
    each score and at random.
    """
    clock = Clock()
    asked = {"experts": experts, "blocks": blocks, "neurons": neurons, "kv_heads": kv_heads}
    structures = {name: _parts(found) for name, found in asked.items() if found is not None}
    of_weights = (betas, targets, ignore, plot) == (_BETAS, "mlp", None, None)
    _check_structures([*structures], scores, multiple, of_weights=of_weights)
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
    if structures:
        common |= {**structures, "scores": scores and _parts(scores)}
        if multiple is not None:
            common["multiple"] = multiple
        with shown_progress() as progress:
            of_structures = emp_llm.compare_structures(
                model, predicted, progress=progress, **common
            )
        _print(of_structures, save, clock, as_json, show_structures_compared)
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


def _check_structures(
    kinds: Sequence[str], scores: str | None, multiple: int | None, *, of_weights: bool
) -> None:
    """Check that options of structures go together.

    Args:
        kinds: Names of the kinds that are asked for.
        scores: The option --scores.
        multiple: The option --multiple.
        of_weights: Whether options of weights are left out.
    """
    options = [f"--{kind.replace('_', '-')}" for kind in kinds]
    if len(kinds) > 1:
        raise typer.BadParameter("go one at a time", param_hint=" and ".join(options))
    if kinds and not of_weights:
        raise typer.BadParameter(
            "goes without --betas, --targets, --ignore and --plot", param_hint=options[0]
        )
    if scores is not None and not kinds:
        raise typer.BadParameter(
            "goes with --experts, --blocks, --neurons or --kv-heads only", param_hint="--scores"
        )
    if multiple is not None and kinds != ["neurons"]:
        raise typer.BadParameter("goes with --neurons only", param_hint="--multiple")


def _parts(listed: str) -> list[str]:
    return [part.strip() for part in listed.split(",")]


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
