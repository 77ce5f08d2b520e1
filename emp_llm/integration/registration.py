"""Makes emp-llm known to transformers: configurations, quantizers, and how models are saved.

transformers has no place to register what is done on saving, nor on reading a configuration, nor
that a checkpoint's own configuration takes an option of ours, nor how many bytes a weight takes. So
four of its methods are wrapped; for models and configurations that are not packed they do what they
always do.
"""

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import wrap_function_wrapper

from emp_llm.tensors.packed_config import DELTA_METHOD, QUANT_METHOD, is_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.quantizers.base import HfQuantizer

    from emp_llm.integration.configs import DeltaConfig, EmpConfig, PackedConfig

__all__ = ["register_configs", "register_quantizers", "wrap_configs"]


def wrap_configs(configuration_utils: ModuleType) -> None:
    """Have a packed checkpoint's configuration read as it is, whatever a script asks for.

    Args:
        configuration_utils: The module ``transformers.configuration_utils``.
    """
    wrap_function_wrapper(configuration_utils, "PreTrainedConfig.from_dict", _from_dict)


def register_configs(auto: ModuleType) -> None:
    """Register the configurations, which programs may read before they load a model.

    Args:
        auto: The module ``transformers.quantizers.auto``.
    """
    from emp_llm.integration.configs import PRUNE_METHOD, DeltaConfig, EmpConfig, PackedConfig

    wrap_function_wrapper(auto, "AutoHfQuantizer.merge_quantization_configs", _merge_configs)
    auto.register_quantization_config(QUANT_METHOD)(PackedConfig)
    auto.register_quantization_config(DELTA_METHOD)(DeltaConfig)
    auto.register_quantization_config(PRUNE_METHOD)(EmpConfig)


def register_quantizers(modeling_utils: ModuleType) -> None:
    """Register quantizers that are imported when a model is loaded, and wrap how it is saved.

    transformers may be in the middle of being imported, by a module of ours too. So nothing is
    imported here that needs ``transformers.modeling_utils``, as the quantizers do. They come last:
    with a transformers in which saving cannot be wrapped, nothing is loaded.

    Args:
        modeling_utils: The module ``transformers.modeling_utils``; nothing loads a model
            without it.
    """
    from transformers.quantizers import auto

    from emp_llm.integration.configs import PRUNE_METHOD

    wrap_function_wrapper(modeling_utils, "PreTrainedModel.save_pretrained", _save_pretrained)
    wrap_function_wrapper(modeling_utils, "PreTrainedModel.get_memory_footprint", _footprint)
    auto.register_quantizer(QUANT_METHOD)(_deferred(_unpacking))
    auto.register_quantizer(DELTA_METHOD)(_deferred(_adding))
    auto.register_quantizer(PRUNE_METHOD)(_deferred(_pruning))


def _from_dict(
    from_dict: Callable[..., Any], _: object, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> object:
    """Take ``quantization_config=None`` for left out.

    transformers' auto classes would put None over what config.json says, and then take packed bytes
    for a weight of another shape.
    """
    if is_packed(args[0] if args else kwargs.get("config_dict", {})):
        given = kwargs.pop("quantization_config", None)
        if given is not None:
            kwargs["quantization_config"] = given
    return from_dict(*args, **kwargs)


def _merge_configs(
    merge: Callable[..., Any], _: object, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> object:
    """Let an `EmpConfig` ask that a packed checkpoint stays packed in memory.

    transformers lets loading attributes of none but its own configurations pass, and raises an
    error if the two are of different classes.
    """
    from emp_llm.integration.configs import DeltaConfig, EmpConfig, PackedConfig

    def named(
        quantization_config: object, quantization_config_from_args: object
    ) -> tuple[object, object]:
        return quantization_config, quantization_config_from_args

    said, asked = named(*args, **kwargs)
    if isinstance(said, dict) and is_packed({"quantization_config": said}):
        kind = PackedConfig if said["quant_method"] == QUANT_METHOD else DeltaConfig
        said = kind(**{name: it for name, it in said.items() if name != "quant_method"})
    if isinstance(said, PackedConfig) and isinstance(asked, EmpConfig):
        kept = said.kept_packed(asked)
        if kept is not None:
            return kept
    return merge(*args, **kwargs)


def _save_pretrained(
    save_pretrained: Callable[..., Any],
    model: "PreTrainedModel",
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> object:
    from emp_llm.integration.save_call import save

    return save(save_pretrained, model, args, kwargs)


def _footprint(
    footprint: Callable[..., int],
    model: "PreTrainedModel",
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> int:
    """Count the bytes that weights have which stay packed in memory."""
    from emp_llm.integration.keeping import packed_parameters

    dense = footprint(*args, **kwargs)
    packed = packed_parameters(model).values()
    return dense - sum(it.numel() * it.itemsize - it.packed_bytes for it in packed)


def _deferred(make: Callable[..., "HfQuantizer"]) -> "type[HfQuantizer]":
    """A class, since that is what transformers registers; an instance is whatever `make` makes."""
    from transformers.quantizers.base import HfQuantizer

    def new(_: type, config: object, **options: object) -> HfQuantizer:
        return make(config, **options)

    return type("DeferredQuantizer", (HfQuantizer,), {"__new__": new, "__module__": __name__})


def _unpacking(config: "PackedConfig", **options: object) -> "HfQuantizer":
    from emp_llm.integration.quantizers import PackedQuantizer

    return PackedQuantizer(config, **options)


def _adding(config: "DeltaConfig", **options: object) -> "HfQuantizer":
    from emp_llm.integration.delta_quantizer import DeltaQuantizer

    return DeltaQuantizer(config, **options)


def _pruning(config: "EmpConfig", **options: object) -> "HfQuantizer":
    from emp_llm.integration.quantizers import PruningQuantizer

    return PruningQuantizer(config, **options)
