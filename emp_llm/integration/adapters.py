"""Merging adapters of PEFT into a pruned model, which stays pruned."""

from collections.abc import Sequence

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from emp_llm.errors import OptionError
from emp_llm.integration.zeros import find_pruned, put_back, take_masks

__all__ = ["merge_adapter"]


def merge_adapter(
    peft_model: PeftModel | PeftMixedModel,
    *,
    adapter_names: str | Sequence[str] | None = None,
    safe_merge: bool = False,
    parameters: str | Sequence[str] | None = None,
) -> PreTrainedModel:
    """Merge adapters into the pruned model below them, and keep its zeros.

    PEFT merges, and every pruned weight is +0.0 again then. So what an adapter added to pruned
    weights is dropped: measure the merged model, not the adapter on top of the pruned one.

    Args:
        peft_model: A pruned model with adapters: LoRA, or others that PEFT can merge.
        adapter_names: Which of them; None for the active ones.
        safe_merge: Whether PEFT is to refuse adapters that make a weight NaN or infinite.
        parameters: As for `emp_llm.SparsityHold`; for a base model that does not say itself what
            was pruned in it.

    Returns:
        The base model, without adapters. It saves itself packed, if it did so before.

    Raises:
        OptionError: If it is no model of PEFT, has no adapter of that name, none that can be
            merged or one that is merged already, or as `emp_llm.SparsityHold` does.
        ValueError: PEFT's, if `safe_merge` refuses. The model is partly merged then, with its
            zeros, and of no use.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    _check(peft_model, names)
    masks = take_masks(peft_model, parameters)
    merged: PreTrainedModel | None = None
    try:
        merged = peft_model.merge_and_unload(
            safe_merge=safe_merge, adapter_names=None if names is None else list(names)
        )
    finally:
        put_back(find_pruned(peft_model if merged is None else merged, parameters), masks)
    return merged


def _check(model: PeftModel | PeftMixedModel, names: Sequence[str] | None) -> None:
    if not isinstance(model, PeftModel | PeftMixedModel):
        raise OptionError(
            f"merge_adapter merges adapters of a PeftModel, and this is a {type(model).__name__}: "
            "load them by peft.PeftModel.from_pretrained(model, adapter)"
        )
    known = list(model.peft_config)
    strange = [name for name in names or () if name not in known]
    if strange:
        raise OptionError(
            f"adapter_names: there is no adapter {strange[0]!r}; the model has "
            f"{', '.join(map(repr, known))}"
        )
    if not hasattr(model, "merge_and_unload"):
        kinds = {str(config.peft_type).rpartition(".")[2] for config in model.peft_config.values()}
        raise OptionError(
            f"adapters of the kind {', '.join(sorted(kinds))} cannot be merged into weights: keep "
            "the adapter beside the model"
        )
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise OptionError(
                f"the adapter {module.merged_adapters[0]!r} is merged already, over the zeros: "
                "call unmerge_adapter() first or, if several are merged, load the model and its "
                "adapters again"
            )
