"""Has pruned a tiny Llama once, so that copies of this process need not import and load things."""

import tempfile
from pathlib import Path

import transformers.models.llama.modeling_llama  # noqa: F401 (targets are then decided in here)
from support.arriving import layer
from support.checkpoints import F, H, llama_config, write_checkpoint

from emp_llm import prune

with tempfile.TemporaryDirectory() as folder:
    source = write_checkpoint(Path(folder) / "source", llama_config(H, F), layer(0))
    prune(source, Path(folder) / "out")
