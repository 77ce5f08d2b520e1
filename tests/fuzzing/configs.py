"""Configs that transformers builds a model from, or nearly; a decision or a refusal comes of each.

transformers is far too large to be taken apart here: what is fuzzed is what stands around it.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from fuzzing.choices import Choices
from fuzzing.headers import check_message
from fuzzing.json_inputs import spoiled, text_of
from support.architectures import ARCHITECTURES, read_tensors, save_tiny_model

from emp_llm.errors import EmpError
from emp_llm.structure import meta_model
from emp_llm.structure.targets import decide_targets

TRIED = ["llama", "qwen2", "gemma2", "gpt2", "mixtral", "t5", "gpt-oss"]

ODD_FIELDS: dict[str, Any] = {
    "auto_map": {"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "modeling.Model"},
    "architectures": ["Pipeline"],
    "quantization_config": {"quant_method": "gptq"},
    "compression_config": [],
    "rope_scaling": {"rope_type": "yarn", "factor": 0},
    "rope_parameters": {"rope_type": "none"},
    "attn_implementation": "someone/kernel",
    "torch_dtype": "float512",
    "dtype": "auto",
    "id2label": {"a": 1},
    "pruned_heads": {"0": [0]},
    "configuration_files": ["config.4.0.0.json"],
    "layer_types": ["none"],
    "sliding_window": -1,
    "hidden_act": "os.system",
    "text_config": {"model_type": "llama"},
    "_name_or_path": "someone/model",
    "device_map": "auto",
    "_commit_hash": 3,
    "distributed_config": {"tp_size": 2},
}


meta_model._PARTS = 20_000  # a model that is too large is known as such in a second, not in ten


@cache
def _tensors(architecture: str, root: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    folder = save_tiny_model(root / architecture, architecture)
    return read_tensors(folder)


def make_config(choices: Choices, root: Path, folder: Path) -> str:
    """Write a config to a folder; returns the architecture that its tensors are of."""
    architecture = choices.pick([name for name in TRIED if name in ARCHITECTURES])
    _tensors(architecture, root)
    config = json.loads((root / architecture / "config.json").read_text())
    if choices.once_in(3):
        name = choices.pick(sorted(ODD_FIELDS))
        config[name] = (
            spoiled(choices, ODD_FIELDS[name]) if choices.once_in(2) else ODD_FIELDS[name]
        )
    for _ in range(choices.pick([0, 1, 1, 2])):
        changed = spoiled(choices, config)
        config = changed if isinstance(changed, dict) or choices.once_in(10) else config
    text = json.dumps(config).encode(errors="surrogatepass")
    (folder / "config.json").write_bytes(text_of(choices, config) if choices.once_in(10) else text)
    for name in ("configuration.py", "modeling.py"):
        (folder / name).write_text("raise SystemExit('code of the checkpoint was run')")
    return architecture


def check_config(root: Path, folder: Path, architecture: str) -> bool:
    """Decide the targets; returns whether the config was taken.

    Raises:
        AssertionError: If a decision is not about a tensor, or what is pruned is no matrix.
    """
    tensors = _tensors(architecture, root)
    try:
        decisions = decide_targets(folder, tensors)
    except EmpError as error:
        check_message(error, "config.json", "'", str(folder))
        return False
    assert list(decisions) == list(tensors)
    for name, decision in decisions.items():
        assert decision.name == name
        assert not decision.prune or len(tensors[name][1]) in (2, 3)
    return True
