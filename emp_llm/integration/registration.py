"""Makes emp-llm's configurations known to transformers."""

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

from emp_llm.tensors.packed_config import QUANT_METHOD

if TYPE_CHECKING:
    from transformers.quantizers.base import HfQuantizer

    from emp_llm.integration.configs import EmpConfig, PackedConfig

__all__ = ["register"]


def register(_modeling_utils: ModuleType) -> None:
    """Register the configurations, and quantizers that are imported when a model is loaded.

    transformers may be in the middle of being imported, by a module of ours too. So nothing is
    imported here that needs ``transformers.modeling_utils``, as the quantizers do.

    Args:
        _modeling_utils: The module ``transformers.modeling_utils``; nothing loads a model
            without it.
    """
    from transformers.quantizers import auto

    from emp_llm.integration.configs import PRUNE_METHOD, EmpConfig, PackedConfig

    auto.register_quantization_config(QUANT_METHOD)(PackedConfig)
    auto.register_quantizer(QUANT_METHOD)(_deferred(_unpacking))
    auto.register_quantization_config(PRUNE_METHOD)(EmpConfig)
    auto.register_quantizer(PRUNE_METHOD)(_deferred(_pruning))


def _deferred(make: Callable[..., "HfQuantizer"]) -> "type[HfQuantizer]":
    """A class, since that is what transformers registers; an instance is whatever `make` makes."""
    from transformers.quantizers.base import HfQuantizer

    def new(_: type, config: object, **options: object) -> HfQuantizer:
        return make(config, **options)

    return type("DeferredQuantizer", (HfQuantizer,), {"__new__": new, "__module__": __name__})


def _unpacking(config: "PackedConfig", **options: object) -> "HfQuantizer":
    from emp_llm.integration.quantizers import PackedQuantizer

    return PackedQuantizer(config, **options)


def _pruning(config: "EmpConfig", **options: object) -> "HfQuantizer":
    from emp_llm.integration.quantizers import PruningQuantizer

    return PruningQuantizer(config, **options)
