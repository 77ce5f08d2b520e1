"""Makes packed checkpoints known to vLLM: the entry point ``vllm.general_plugins``.

vLLM calls it in each of its processes, whatever model is served, so nothing is imported before.
"""

from emp_llm.tensors.packed_config import QUANT_METHOD

__all__ = ["register"]


def register() -> None:
    """Register the quantization method that the config.json of packed checkpoints names."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from emp_llm.serving.vllm_config import PackedModelConfig

    register_quantization_config(QUANT_METHOD)(PackedModelConfig)
