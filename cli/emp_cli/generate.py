"""``emp-llm generate``."""

import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from emp_cli.arguments import Device, Dtype, Json, Model, Revision, TrustRemoteCode
from emp_cli.console import Clock, command, print_json, shown_progress
from emp_llm.messages import printable

if TYPE_CHECKING:
    from emp_llm.generation.results import Agreement, Generated, Generation, Weights

__all__ = ["generate"]

_WEIGHTS: "dict[Weights, str]" = {
    "dense": "dense",
    "unpacked": "unpacked while it was loaded",
    "packed": "packed in memory",
    "pruned": "pruned at β = 1 while it was loaded, packed in memory",
}


@command
def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from stdin.")
    ],
    packed: Annotated[
        bool,
        typer.Option(
            "--packed",
            metavar="",
            help="Keep weights packed in memory; those of a dense MODEL are pruned at β = 1 first.",
        ),
    ] = False,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            metavar="",
            help="The prompt is a user's message; it is put into the tokenizer's chat template.",
        ),
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens to generate at most.")
    ] = 100,
    temperature: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="FLOAT",
            help="0: always the most probable token; above, tokens are drawn.",
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of what is drawn.")] = 0,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="DENSE",
            help="Let this model generate too, and compare texts, speed and memory.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Threads on the CPU. Default: as torch chooses."),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Have a model write a text, then show its speed and its memory.

    The text goes to stdout as it is generated, everything else to stderr.
    """
    clock = Clock()
    from emp_llm.entrypoints.generate import generate as run
    from emp_llm.generation.listener import Deaf
    from emp_llm.generation.options import GenerateOptions

    options = GenerateOptions(
        keep_packed=packed,
        max_new_tokens=max_new_tokens,
        chat=chat,
        temperature=temperature,
        seed=seed,
        threads=threads,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    with ExitStack() as shown:
        progress = shown.enter_context(shown_progress())
        found = run(
            model,
            _text(prompt),
            options,
            against=against,
            revision=revision,
            # the first text takes the place of the progress
            listener=Deaf() if as_json else _Printer(shown.close, named=against is not None),
            progress=progress,
        )
    if as_json:
        print_json(found.to_dict() | clock.to_dict())
    else:
        _show(found)


def _text(prompt: str) -> str:
    if prompt != "-":
        return prompt
    if sys.stdin is None:
        raise typer.BadParameter("is -, and stdin is closed: give the text", param_hint="PROMPT")
    return sys.stdin.read()


class _Printer:
    """A listener that prints what it hears.

    Args:
        begin: Called before anything is printed.
        named: Whether the names of the models stand above their texts.
    """

    def __init__(self, begin: Callable[[], None], *, named: bool) -> None:
        self._begin, self._named = begin, named

    def begin(self, model: str, weights: "Weights") -> None:
        self._begin()
        if self._named:
            typer.echo(f"{printable(model)} ({_WEIGHTS[weights]}):")

    def hear(self, text: str) -> None:
        typer.echo("".join(map(_visible, text)), nl=False)

    def end(self) -> None:
        typer.echo("\n" if self._named else "")


def _visible(character: str) -> str:
    """Line breaks and tabs as they are; an escape for a character that a terminal obeys."""
    if character in "\n\t" or unicodedata.category(character) != "Cc":
        return character
    return printable(character)


def _show(found: "Generation") -> None:
    from emp_cli.tables import show

    model, against = found.model, found.against
    lines = [f"{model.model}: {_WEIGHTS[model.weights]}, {_where(model)}"]
    header, rows = ["", "model"], [[name, cell] for name, cell, _ in _rows(model)]
    if against is not None:
        lines.append(f"against {against.model}: {_WEIGHTS[against.weights]}, {_where(against)}")
        header += ["against", "ratio"]
        pairs = zip(_rows(model), _rows(against), strict=True)
        rows = [[name, ours, theirs, _ratio(a, b)] for (name, ours, a), (_, theirs, b) in pairs]
    for one in filter(None, (model, against)):
        if one.ended == "positions":
            asked = found.options.max_new_tokens
            got = f"{len(one.new_ids)} of {asked} tokens"
            lines.append(f"{one.model}: {got}, for the text ends at the model's last position")
    for line in lines:
        typer.echo(printable(line), err=True)
    show("", header, rows, err=True)
    if against is not None:
        typer.echo(printable(_comparison(found.agreement)), err=True)


def _where(generated: "Generated") -> str:
    """Dtype and device, and the threads of the CPU."""
    where = f"{generated.dtype} on {generated.device}"
    if generated.device != "cpu":
        return where
    return f"{where}, {generated.threads} thread{'s' if generated.threads > 1 else ''}"


def _rows(found: "Generated") -> Iterator[tuple[str, str, float | None]]:
    """Name, cell and number of each line of the table."""
    from emp_cli.tables import size

    rates = ("prompt, tokens/s", found.prompt_rate), ("decoding, tokens/s", found.decode_rate)
    yield "tokens of the prompt", f"{len(found.prompt_ids)}", None
    yield "tokens generated", f"{len(found.new_ids)}", None
    yield "loading, s", f"{found.load_seconds:.2f}", found.load_seconds
    yield "first token, s", f"{found.first_seconds:.3f}", found.first_seconds
    for name, rate in rates:
        yield name, "" if rate is None else f"{rate:.1f}", rate
    yield "weights", size(found.weights_bytes), found.weights_bytes
    yield "peak memory", size(found.peak_bytes), found.peak_bytes
    yield "resident memory", size(found.resident_bytes), found.resident_bytes
    yield "  before loading", size(found.bytes_before), found.bytes_before
    if found.gpu_peak_bytes is not None:
        yield "peak memory of GPUs", size(found.gpu_peak_bytes), found.gpu_peak_bytes


def _ratio(ours: float | None, theirs: float | None) -> str:
    return f"{ours / theirs:.2f}" if ours and theirs else ""


def _comparison(agreement: "Agreement | None") -> str:
    if agreement is None:
        return "the prompt has other tokens in the other model, so the texts are not compared"
    if agreement.same:
        return f"both texts are the same, {agreement.tokens} tokens"
    ours, theirs = (
        f"“{words}”" if words else "the end"
        for words in (agreement.model_goes_on, agreement.against_goes_on)
    )
    return f"the texts part after {agreement.tokens} tokens: {ours}, against {theirs}"
