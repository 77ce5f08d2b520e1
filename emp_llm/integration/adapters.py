"""Merging PEFT's adapters into a pruned model, which stays pruned."""

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

    PEFT merges, then every pruned weight is set to +0.0 again. What an adapter added to pruned
    weights is lost: evaluate the merged model, not the adapter on top of the pruned one.

    Args:
        peft_model: A pruned model with adapters: LoRA, or others that PEFT can merge.
        adapter_names: Adapters to merge; None for the active ones.
        safe_merge: Whether PEFT refuses adapters that make a weight NaN or infinite.
        parameters: As for `emp_llm.SparsityHold`; needed if the base model was not loaded through
            emp-llm.

    Returns:
        The base model, without adapters. It is saved packed if it was before.

    Raises:
        OptionError: If it is not a model of PEFT, has no adapter of that name, has adapters that
            cannot be merged or are merged already; or as `emp_llm.SparsityHold` raises it.
        ValueError: PEFT's, if `safe_merge` refuses. The model is then partly merged, with its
            zeros; load it again.
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
