"""``emp-llm eval``."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emp_cli.arguments import (
    Context,
    Device,
    Dtype,
    Json,
    Model,
    Protocol,
    Revision,
    TrustRemoteCode,
)
from emp_cli.console import Clock, command, print_json, shown_progress

if TYPE_CHECKING:
    from emp_llm.evaluation.scores import Evaluation, Score

__all__ = ["evaluate"]

_DEFAULT_TEXT = "wikitext2"
_ERROR = "± s.e."


def _batch_size(value: str) -> int | None:
    """``auto`` is None."""
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise typer.BadParameter("is neither auto nor a number from 1 on")
    return int(value)


@command
def evaluate(
    model: Model,
    against: Annotated[
        str | None,
        typer.Option(metavar="DENSE", help="Measure this model too, and show the difference."),
    ] = None,
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="A text to predict: wikitext2, ptb, c4, a file, or DATASET[:CONFIG[:SPLIT]] of "
            "the Hub; repeatable. Default: wikitext2, unless --tasks is given.",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK,…",
            help="Tasks or groups of lm-eval; paper7 stands for the seven of the EMP paper. "
            "Repeatable.",
        ),
    ] = None,
    protocol: Protocol = "paper",
    context: Context = 2048,
    include_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A folder of YAML files with more tasks.")
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Examples before each question of a task."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Only the first N questions of each task."),
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option(
            metavar="N|auto", help="Answers to score at a time; auto: as many as fit on a GPU."
        ),
    ] = "1",
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    save: Annotated[
        bool,
        typer.Option("--save", metavar="", help="Add the results to the model's folder and card."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity and zero-shot accuracy, alone or beside the dense model."""
    batch = _batch_size(batch_size)
    clock = Clock()
    from emp_llm.entrypoints.evaluate import evaluate as run
    from emp_llm.evaluation.options import EvalOptions

    names = [name.strip() for part in tasks or () for name in part.split(",") if name.strip()]
    options = EvalOptions(
        texts=tuple(perplexity or (() if names else (_DEFAULT_TEXT,))),
        tasks=tuple(names),
        protocol=protocol,
        context=context,
        dtype=dtype,
        device=device,
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch,
        trust_remote_code=trust_remote_code,
    )
    if save:
        from emp_llm.evaluation.saving import check_can_save, save_results

        check_can_save(model)
    with shown_progress() as progress:
        found = run(model, options, against=against, revision=revision, progress=progress)
    if save:  # first: whoever reads stdout may stop reading
        save_results(model, found.results())
    if as_json:
        print_json(found.to_dict() | clock.to_dict())
    else:
        _show(found)
    if save:
        typer.echo(f"{model}: results added to emp_eval.json and README.md", err=as_json)


def _show(found: "Evaluation") -> None:
    from rich.console import Console

    from emp_cli.tables import show

    options, scores = found.options, list(found.scores())
    how = [f"protocol {options.protocol}, context {options.context}"] if options.texts else []
    how += [f"first {options.limit} questions"] if options.limit and options.tasks else []
    against = [f"against {found.against.model}"] if found.against else []
    # not as the table's title, which is folded to the width of the table
    title = [found.model.model, *against, ", ".join([*how, found.model.dtype])]
    Console(highlight=False, markup=False).print(*title, sep="\n")
    header = ["data", "metric", "model" if found.against else "value", _ERROR]
    rows = [_row(score) for score in scores]
    if found.against:
        header += ["against", _ERROR, "difference"]
        rows = [(*row, *_compared(score)) for row, score in zip(rows, scores, strict=True)]
    with_errors = any(score.stderr is not None for score in scores)
    shown = [i for i, name in enumerate(header) if with_errors or name != _ERROR]
    show("", [header[i] for i in shown], ([row[i] for i in shown] for row in rows), left=2)


def _row(score: "Score") -> tuple[str, ...]:
    return score.subject, score.metric, _number(score.value), _error(score.stderr)


def _compared(score: "Score") -> Iterator[str]:
    yield "" if score.against is None else _number(score.against)
    yield _error(score.against_stderr)
    yield "" if score.difference is None else f"{score.difference:+.4f}"


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def _error(stderr: float | None) -> str:
    return "" if stderr is None else f"{stderr:.4f}"
