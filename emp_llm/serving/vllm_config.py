"""What vLLM makes of a packed checkpoint's quantization_config. Nothing here is quantized."""

import time
from collections.abc import Iterator
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform

from emp_llm.checkpoint.dtypes import PRUNABLE, TORCH_NAMES
from emp_llm.errors import OptionError
from emp_llm.serving.options import keeps_packed
from emp_llm.serving.stored_weights import check_folder, packed_shards, stored_weights
from emp_llm.serving.vllm_layers import PackedMethod
from emp_llm.tensors.packed_config import QUANT_METHOD, check_version

__all__ = ["PackedModelConfig"]


class PackedModelConfig(QuantizationConfig):
    """The quantization method ``emp``: an ordinary model, whose weights are unpacked as they load.

    vLLM makes one when it starts, and asks it for the method of each layer while it builds a model,
    in each process that does.
    """

    @classmethod
    def get_name(cls) -> str:
        """The ``quant_method`` in config.json."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """The dtypes that weights are packed in; vLLM casts to that of its ``--dtype``."""
        return [getattr(torch, TORCH_NAMES[name]) for name in PRUNABLE]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU will do."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PackedModelConfig":
        """Check the ``quantization_config`` of config.json.

        Raises:
            FormatError: If it is of a version that this release does not know.
        """
        check_version(config)
        return cls()

    def maybe_update_config(self, model_name: str, *_: object, **__: object) -> None:
        """Check a local folder now, before vLLM starts the processes that load it.

        Raises:
            CheckpointError: If a part is missing or cut off.
            FormatError: If a plane is missing.
        """
        if (folder := Path(model_name)).is_dir():
            check_folder(folder)

    def get_quant_method(
        self, layer: torch.nn.Module, *_: object, **__: object
    ) -> QuantizeMethodBase | None:
        """The method of a layer; None leaves it to vLLM, dense.

        Raises:
            OptionError: As `keeps_packed` raises it; or if weights cannot stay packed here.
        """
        _have_packed_files_read()
        linear = isinstance(layer, LinearBase)
        if not _keeps_packed():
            return UnquantizedLinearMethod() if linear else None
        if not current_platform.is_cpu():
            raise OptionError(
                f"additional_config: weights stay packed on CPUs only, and this is "
                f"{current_platform.device_name}: leave keep_packed out"
            )
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if linear:
            return PackedMethod(UnquantizedLinearMethod(), layers)
        if isinstance(layer, VocabParallelEmbedding):
            return PackedMethod(UnquantizedEmbeddingMethod(), layers)
        return None


def _keeps_packed() -> bool:
    """What the configuration says by which this process builds and loads a model."""
    return keeps_packed(get_current_vllm_config().additional_config)


@cache
def _have_packed_files_read() -> None:
    """Have vLLM's loader read packed checkpoints, too, in this process.

    vLLM chooses a loader by ``--load-format``, which knows nothing of the model, so that a loader
    of our own would have to be asked for on the command line.
    """
    read_files = DefaultModelLoader._get_weights_iterator

    @wraps(read_files)
    def read(
        loader: DefaultModelLoader, source: DefaultModelLoader.Source
    ) -> Iterator[tuple[str, torch.Tensor]]:
        _, files, is_safetensors, _ = loader._prepare_weights(
            source.model_or_path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        shards = packed_shards(map(Path, files)) if is_safetensors else []
        if not shards:
            dense: Iterator[tuple[str, torch.Tensor]] = read_files(loader, source)
            return dense
        loader.counter_before_loading_weights = time.perf_counter()  # for vLLM's log
        weights = stored_weights(shards, keep_packed=_keeps_packed())
        return ((source.prefix + name, tensor) for name, tensor in weights)

    DefaultModelLoader._get_weights_iterator = read
