"""Tells transformers of emp-llm's configurations."""

from types import ModuleType

from emp_llm.tensors.packed import QUANT_METHOD

__all__ = ["register"]


def register(_modeling_utils: ModuleType) -> None:
    """Register everything.

    Args:
        _modeling_utils: The module ``transformers.modeling_utils``, imported: nothing loads a
            model without it, and what is imported here needs it.
    """
    from transformers.quantizers import auto

    from emp_llm.integration.configs import PRUNE_METHOD, EmpConfig, PackedConfig
    from emp_llm.integration.quantizers import PackedQuantizer, PruningQuantizer

    auto.register_quantization_config(QUANT_METHOD)(PackedConfig)
    auto.register_quantizer(QUANT_METHOD)(PackedQuantizer)
    auto.register_quantization_config(PRUNE_METHOD)(EmpConfig)
    auto.register_quantizer(PRUNE_METHOD)(PruningQuantizer)
