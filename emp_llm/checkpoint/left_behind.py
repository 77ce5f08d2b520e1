"""Which files of a source stay behind when it is pruned, and why; all others travel with it.

Only what is known by its name stays behind: other copies of the weights that are pruned, and what a
training has left. A file of any other name may be needed, whatever it holds: an adapter, a head, a
projector, a codec, a draft model. So it travels, and so does a folder that holds another model.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, TypedDict

__all__ = ["CONFIG_NAME", "BesideWeights", "LeftBehind", "holds_weights", "sort_files"]

CONFIG_NAME: Final = "config.json"

_WEIGHTS = (
    *(".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".ot"),
    *(".npz", ".pkl", ".onnx", ".onnx_data", ".onnx.data", ".pb", ".tflite", ".mlmodel", ".nemo"),
)

_INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$", re.IGNORECASE)
"""How the name of an index of shards ends, after the name of the weights."""

_PART = r"(-\d{5}-of-\d{5})?"
_VARIANT = r"(\.(fp16|float16|fp32|float32|bf16|bfloat16|fp8|int8|8bit|4bit|(no[n_]?_?)?ema))?"
_NO_PART = (  # a name that does not say that the file holds another part of a model
    r"(?!vision|audio|.*(mmproj|projector|encoder|decoder|vocoder|codec|draft|mtp|adapter|lora))"
)
_ONNX_PARTS = r"(encoder_|decoder_|decoder_with_past_)?model"

_TRAINING: Final = "training leftovers"
_COPY: Final = "the same weights in another file"


@dataclass(frozen=True)
class _Rule:
    """Files that stay behind.

    Attributes:
        names: Matches their paths; with ``/`` at its end, a folder that stays behind as a whole.
        reason: Why.
    """

    names: re.Pattern[str]
    reason: str


def _rule(reason: str, *patterns: str) -> _Rule:
    return _Rule(re.compile("|".join(patterns), re.IGNORECASE), reason)


_RULES = (
    _rule(
        _COPY,
        rf"(open_clip_)?(model|pytorch_model){_VARIANT}{_PART}{_VARIANT}\.(safetensors|bin)",
        r"model\.(pt|pth|ckpt|pkl)",
        r"gptq_model[\w.-]*\.(safetensors|bin|pt)",
    ),
    _rule("the same weights in Meta's format", r"consolidated([.-].+)?\.(safetensors|pth)"),
    _rule("the same weights in Meta's format", "original/"),
    _rule(
        "the same weights for TensorFlow",
        rf"(tf_)?model{_PART}\.h5",
        r"(\w+_)?model\.ckpt[.-].+",
        r"saved_model(/|\.pb)",
        r"(model|\d+)[\w-]*\.tflite",
    ),
    _rule("the same weights for Flax", rf"(flax_)?model{_PART}\.msgpack"),
    _rule("the same weights for Rust", r"(rust_)?model\.ot"),
    _rule("the same weights for MLX", r"(weights|model)(\.\d+)?\.npz"),
    _rule("the same weights for Paddle", r"model_state\.pdparams"),
    _rule("the same weights for MindSpore", rf"mindspore_model{_PART}\.ckpt"),
    _rule("the same weights for NeMo", rf"{_NO_PART}[^/]+\.nemo"),
    _rule(
        "the same weights for llama.cpp",
        rf"(gguf/)?{_NO_PART}[^/]+\.gguf",
        rf"{_NO_PART}(ggml-[^/]+\.bin|[^/]+\.(ggml|llamafile))",
    ),
    _rule(
        "the same weights for ONNX",
        rf"(onnx/)?{_ONNX_PARTS}(_[\w-]+)?\.(onnx|onnx_data(_\d+)?|onnx\.data)",
        r"onnx/(embed_tokens|(vision|audio)_encoder|(text|vision|audio)_model)(_\w+)?"
        r"\.onnx(_data(_\d+)?)?",
    ),
    _rule("the same weights for OpenVINO", "openvino/", r"openvino_model[\w-]*\.(bin|xml)"),
    _rule("the same weights for Core ML", "coreml/", r"model\.(mlmodel|(mlpackage|mlmodelc)/)"),
    _rule("the same weights for Metal", r"metal/model\.bin"),
    _rule(
        _TRAINING,
        r"checkpoint-[^/]+/",
        r"global_step[^/]*/",
        "(runs|wandb|lightning_logs|last-checkpoint)/",
        r"((pytorch_model_fsdp|optimizer)_\d+|pytorch_model)/",
        r"((bf16_)?zero_pp_rank|mp_rank)_\d.*\.pt",
        r"(optimizer|scheduler)(_\d+)?\.(pt|pth|bin)",
        r"(rng_state|random_states)(_\d+)?\.(pth|pkl)",
        r"scaler\.pt|sampler(_\d+)?\.bin|training_args\.bin",
    ),
)

_META_LLAMA = _rule("describes the weights in Meta's format", r"params\.json", r"(.+/)?[^/]*\.chk")


class LeftBehind(TypedDict):
    """Files that stay behind.

    Attributes:
        path: The file, relative to the checkpoint's folder; or a folder, with ``/`` at its end.
        reason: Why it stays behind.
        files: How many files it is; 0 for a folder that is not looked into, such as a link to one.
        bytes: Their size.
    """

    path: str
    reason: str
    files: int
    bytes: int


@dataclass(frozen=True)
class BesideWeights:
    """The files beside the weights that are pruned.

    Attributes:
        travelling: Paths of those that are written beside the pruned weights, and their bytes.
        left_behind: The others, sorted, but for hidden ones.
    """

    travelling: Mapping[str, int]
    left_behind: tuple[LeftBehind, ...]


def sort_files(
    sizes: Mapping[str, int], weights: Iterable[str], *, meta_llama: bool = False
) -> BesideWeights:
    """Sort the files of a source by whether they travel.

    Neither travelling nor left behind are hidden files and folders, the ``config.json`` at the top,
    which is written anew, and the weights that are pruned.

    Args:
        sizes: The bytes of each file, by its path in the checkpoint.
        weights: Names of the files that hold the weights, or lead to them.
        meta_llama: Whether the weights are in Meta's original format.
    """
    rules = (*_RULES, _META_LLAMA) if meta_llama else _RULES
    travelling: dict[str, int] = {}
    left: dict[str, LeftBehind] = {}
    for path in sorted(_visible(sizes).difference({CONFIG_NAME, *weights})):
        found = next(_left_by(path, rules), None)
        if found is None:
            travelling[path] = sizes[path]
            continue
        what, reason = found
        entry = left.setdefault(what, {"path": what, "reason": reason, "files": 0, "bytes": 0})
        entry["files"] += 1
        entry["bytes"] += sizes[path]
    return BesideWeights(travelling, tuple(left.values()))


def _visible(paths: Collection[str]) -> set[str]:
    return {path for path in paths if not any(p.startswith(".") for p in PurePosixPath(path).parts)}


def _left_by(path: str, rules: Iterable[_Rule]) -> Iterator[tuple[str, str]]:
    """The file, or the folder of it, that stays behind by each of some rules; and why."""
    folder = "".join(path.partition("/")[:2])
    weights = _INDEX.sub("", path)  # an index stays behind with its weights
    for rule in rules:
        if rule.names.fullmatch(folder) and folder != path:
            yield folder, rule.reason
        if rule.names.fullmatch(weights):
            yield path, rule.reason


def holds_weights(path: str) -> bool:
    """Whether a file holds weights of some kind, by the end of its name."""
    return path.lower().endswith(_WEIGHTS)
