"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = [
    "Beta",
    "BetaOrAuto",
    "Calibration",
    "Context",
    "CountByOption",
    "Criterion",
    "Device",
    "Dtype",
    "GranularityOption",
    "Html",
    "Ignore",
    "Json",
    "KernelDevice",
    "Length",
    "MaxLossIncrease",
    "Model",
    "NoSequential",
    "Out",
    "Overwrite",
    "Png",
    "Private",
    "Protocol",
    "RepairOption",
    "Revision",
    "Samples",
    "Seed",
    "TargetSparsity",
    "Targets",
    "Threads",
]

from emp_llm.options import CountBy, Granularity, Repair

# parts of the help
_HOW_MANY = "How many weights stay"
_DATA = "Scores from data"

Model = Annotated[str, typer.Argument(help="A folder, or a model of the Hugging Face Hub.")]
Out = Annotated[Path, typer.Option(help="The folder to write.", show_default=False)]
Beta = Annotated[
    float | None,
    typer.Option(
        help="Keep β times the effective number of weights; 1 is the paper's rule.",
        show_default="1.0",
        rich_help_panel=_HOW_MANY,
    ),
]
BetaOrAuto = Annotated[
    str | None,
    typer.Option(
        metavar="FLOAT|auto",
        help="Keep β times the effective number of weights; 1 is the paper's rule. auto searches "
        "for the least β that --max-loss-increase allows.",
        show_default="1.0",
        rich_help_panel=_HOW_MANY,
    ),
]
MaxLossIncrease = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        help="With --beta auto: by how many per cent the loss on the calibration text may rise.",
        show_default=False,
        rich_help_panel=_HOW_MANY,
    ),
]
TargetSparsity = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Find the β that prunes this share of all targets' weights, such as 0.5.",
        show_default=False,
        rich_help_panel=_HOW_MANY,
    ),
]
GranularityOption = Annotated[
    Granularity,
    typer.Option(
        "--granularity",
        help="What is ranked together: all inputs of a neuron, a matrix, or all targets.",
        rich_help_panel=_HOW_MANY,
    ),
]
CountByOption = Annotated[
    CountBy,
    typer.Option(
        "--count-by",
        help="Whose effective number counts: that of the criterion's scores, or of magnitudes.",
        rich_help_panel=_HOW_MANY,
    ),
]
Criterion = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What ranks the weights: magnitude, wanda, ria, taylor, obs or random, or a class of "
        "your own as module:Class.",
        rich_help_panel=_DATA,
    ),
]
RepairOption = Annotated[
    Repair,
    typer.Option(
        "--repair",
        help="Restore what pruned layers give: obs changes the weights that stay, bias the biases.",
        rich_help_panel=_DATA,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="The data: wikitext2, ptb, c4, a file, or DATASET[:CONFIG[:SPLIT]] of the Hub.",
        show_default=False,
        rich_help_panel=_DATA,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(min=1, help="How many samples of it.", show_default="128", rich_help_panel=_DATA),
]
Length = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Tokens in a sample.",
        show_default="2048, or all that the model can see",
        rich_help_panel=_DATA,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Of the places that samples are taken from, and of the criterion random.",
        show_default="0",
        rich_help_panel=_DATA,
    ),
]
NoSequential = Annotated[
    bool,
    typer.Option(
        "--no-sequential",
        help="Feed each block with what the dense blocks before it give, not the pruned ones.",
        rich_help_panel=_DATA,
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
KernelDevice = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda[:N]",
        help="Where the work is done; auto takes GPUs where that is faster.",
    ),
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
