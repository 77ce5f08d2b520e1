"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = [
    "Beta",
    "Context",
    "Device",
    "Dtype",
    "GranularityOption",
    "Html",
    "Ignore",
    "Json",
    "Model",
    "Out",
    "Overwrite",
    "Png",
    "Private",
    "Protocol",
    "Revision",
    "Targets",
    "Threads",
]

from emp_llm.options import Granularity

Model = Annotated[str, typer.Argument(help="A folder, or a model of the Hugging Face Hub.")]
Out = Annotated[Path, typer.Option(help="The folder to write.", show_default=False)]
Beta = Annotated[
    float, typer.Option(help="Keep β times the effective number of weights; 1 is the paper's rule.")
]
GranularityOption = Annotated[
    Granularity,
    typer.Option(
        "--granularity",
        help="What is ranked together: all inputs of a neuron, a matrix, or all targets.",
    ),
]
Targets = Annotated[
    str,
    typer.Option(
        help="mlp, attention, all-linear, or a regular expression on the checkpoint's names."
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(help="Leave targets alone that this regular expression finds; repeatable."),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit on the Hub.", show_default=False)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in --out.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads; all cores by default. Results do not depend on it."),
]
Private = Annotated[
    bool, typer.Option("--private", help="Make the repository private, if it is made.")
]
Protocol = Annotated[
    Literal["paper", "gptq"],
    typer.Option(help="Perplexity with the last, partial block, or of full blocks only."),
]
Context = Annotated[int, typer.Option(min=2, help="Tokens in a block of perplexity.")]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    typer.Option(help="What the weights are made; auto leaves them as they are."),
]
Device = Annotated[
    str, typer.Option(metavar="auto|cpu|cuda[:N]", help="auto takes all GPUs there are.")
]
Html = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.html", help="Write it as one page for a browser, too.", show_default=False
    ),
]
Png = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.png",
        help="Draw FILE-curve.png, -blocks and -rows for a paper, too; .pdf and .svg as well.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
