"""Arguments and options that several commands share.

Every option has a metavar, and flags an empty one: the names of Python's types, which Typer shows
otherwise, say little and take the room that the help needs in 80 columns.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from emp_llm.options import Allocate, CountBy, Granularity, Preset, Repair, Rest

__all__ = [
    "Base",
    "Beta",
    "BetaOrAuto",
    "Calibration",
    "Context",
    "CountByOption",
    "Criterion",
    "Device",
    "DiscardSource",
    "Dtype",
    "GranularityOption",
    "Html",
    "Ignore",
    "Json",
    "KernelDevice",
    "Length",
    "MaxLossIncrease",
    "Model",
    "Multiple",
    "NoSequential",
    "Out",
    "Overwrite",
    "Png",
    "PresetOption",
    "Private",
    "Protocol",
    "Recover",
    "RepairOption",
    "RestOption",
    "Revision",
    "Samples",
    "Seed",
    "TargetSparsity",
    "Targets",
    "Threads",
    "TrustRemoteCode",
    "TrustTokenizerCode",
]

# headings of the help
_HOW_MANY = "How many weights stay"
_DATA = "Scores from data"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, or a model of the Hugging Face Hub.")
]
Out = Annotated[
    Path, typer.Option(metavar="FOLDER", help="The folder to write.", show_default=False)
]
DiscardSource = Annotated[
    bool,
    typer.Option(
        "--discard-source",
        metavar="",
        help="Once a shard that this run downloaded is packed, delete it from the cache.",
    ),
]
RestOption = Annotated[
    Rest,
    typer.Option(
        "--rest",
        metavar="packed|plain",
        help="Pack the tensors that are not pruned too, without loss, or leave them plain.",
    ),
]
Beta = Annotated[
    float | None,
    typer.Option(
        metavar="FLOAT",
        help="Keep β times the effective number of weights. Default: 1, as in the paper.",
        rich_help_panel=_HOW_MANY,
    ),
]
BetaOrAuto = Annotated[
    str | None,
    typer.Option(
        metavar="FLOAT|auto",
        help="Keep β times the effective number of weights. Default: 1, as in the paper. auto "
        "searches for the smallest β that --max-loss-increase allows.",
        rich_help_panel=_HOW_MANY,
    ),
]
MaxLossIncrease = Annotated[
    float | None,
    typer.Option(
        metavar="PERCENT",
        help="With --beta auto: how much the loss on the calibration text may rise, such as 5.",
        rich_help_panel=_HOW_MANY,
    ),
]
TargetSparsity = Annotated[
    float | None,
    typer.Option(
        metavar="FLOAT",
        help="Find the β that prunes this share of all targets' weights, such as 0.5.",
        rich_help_panel=_HOW_MANY,
    ),
]
GranularityOption = Annotated[
    Granularity,
    typer.Option(
        "--granularity",
        metavar="row|layer|model",
        help="Which weights are ranked together: the inputs of one neuron, one matrix, or all "
        "targets.",
        rich_help_panel=_HOW_MANY,
    ),
]
AllocateOption = Annotated[
    Allocate,
    typer.Option(
        "--allocate",
        metavar="emp|uniform|loss",
        help="How the weights that stay are spread: as the effective numbers say, the same share "
        "everywhere, or by matrix so that the loss on the data rises the least.",
        rich_help_panel=_HOW_MANY,
    ),
]
CountByOption = Annotated[
    CountBy | None,
    typer.Option(
        "--count-by",
        metavar="criterion|magnitude",
        help="Whether the effective number is that of the criterion's scores or of the magnitudes. "
        "Default: criterion.",
        rich_help_panel=_HOW_MANY,
    ),
]
PresetOption = Annotated[
    Preset | None,
    typer.Option(
        "--preset",
        metavar="paper|repaired|best",
        help="What is best at three levels of effort: magnitudes alone; scores and repair from "
        "data; and a short training after it. Options below change single parts. Default: "
        "repaired if only --calibration is given, or else paper.",
        rich_help_panel=_DATA,
    ),
]
Criterion = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How weights are ranked: magnitude, wanda, ria, taylor, obs or random, or by a class "
        "of your own, module:Class. Default: magnitude.",
        rich_help_panel=_DATA,
    ),
]
RepairOption = Annotated[
    Repair | None,
    typer.Option(
        "--repair",
        metavar="none|obs|swaps|bias",
        help="Bring the outputs of pruned layers back towards the dense ones: obs changes the "
        "weights that stay, swaps also which ones of a row stay, bias the biases. Default: none.",
        rich_help_panel=_DATA,
    ),
]
Recover = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="STEPS",
        help="Then train the weights that stay, norms and biases towards the dense model's "
        "predictions. The whole model has to fit in memory. Default: 0.",
        rich_help_panel=_DATA,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="The data: wikitext2, ptb, c4, a file, or DATASET[:CONFIG[:SPLIT]] of the Hub.",
        rich_help_panel=_DATA,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Samples to take from it. Default: 128.", rich_help_panel=_DATA
    ),
]
Length = Annotated[
    int | None,
    typer.Option(
        min=2,
        metavar="N",
        help="Tokens in a sample. Default: 2048, or the model's context if that is shorter.",
        rich_help_panel=_DATA,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Seed of the places that samples start at, and of the criterion random. Default: 0.",
        rich_help_panel=_DATA,
    ),
]
NoSequential = Annotated[
    bool,
    typer.Option(
        "--no-sequential",
        metavar="",
        help="Give each decoder block the outputs of the dense blocks before it, not of the "
        "pruned ones.",
        rich_help_panel=_DATA,
    ),
]
TrustTokenizerCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        metavar="",
        help="Run code that comes with the tokenizer, where loading it needs that.",
        rich_help_panel=_DATA,
    ),
]
Multiple = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Keep a multiple of N neurons, the nearest one to P%. Default: 64."
    ),
]
Targets = Annotated[
    str,
    typer.Option(
        metavar="TARGETS",
        help="What to prune: mlp, attention, all-linear, or a regular expression searched in the "
        "names of the checkpoint's tensors.",
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX",
        help="Do not prune targets whose names match this regular expression; repeatable.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="BASE",
        help="The model that MODEL was fine-tuned from, a folder or a model of the Hub: prune and "
        "store the differences to it, which loading adds to it again.",
    ),
]
Revision = Annotated[
    str | None, typer.Option(metavar="NAME", help="Branch, tag or commit on the Hub.")
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        metavar="",
        help="Replace the checkpoint in --out, or discard an unfinished run in it.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Threads. Default: all cores. Results do not depend on it."
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        metavar="",
        help="Run code that comes with the model or its tokenizer, where loading needs that.",
    ),
]
Private = Annotated[
    bool,
    typer.Option("--private", metavar="", help="Make the repository private, if it is created."),
]
Protocol = Annotated[
    Literal["paper", "gptq"],
    typer.Option(
        metavar="paper|gptq",
        help="How perplexity is computed: with the last, shorter window of the text, or with full "
        "windows only.",
    ),
]
Context = Annotated[
    int, typer.Option(min=2, metavar="N", help="Tokens in a window of the perplexity.")
]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    typer.Option(
        metavar="DTYPE",
        help="What the weights are cast to: bfloat16, float16 or float32; auto leaves them as "
        "they are stored.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|cuda[:N]", help="Where the model runs; auto uses all GPUs there are."
    ),
]
KernelDevice = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda[:N]",
        help="Where the work is done; auto uses GPUs where they are faster.",
    ),
]
Html = Annotated[
    Path | None,
    typer.Option(metavar="FILE.html", help="Also write the result as one page for a browser."),
]
Png = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.png",
        help="Also draw FILE-curve.png, FILE-blocks.png and FILE-rows.png for a paper; .pdf and "
        ".svg work, too.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", metavar="", help="Print one JSON object instead of a table.")
]
