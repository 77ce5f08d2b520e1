"""``EmpConfig`` for `from_pretrained`, and the configuration that packed checkpoints carry."""

from collections.abc import Sequence
from copy import copy
from typing import Any, ClassVar

from transformers.utils.quantization_config import QuantizationConfigMixin

from emp_llm.errors import OptionError
from emp_llm.options import Granularity, PruneOptions, Rest, packs_rest, patterns
from emp_llm.rule_fields import rule_fields
from emp_llm.tensors.packed_config import (
    DELTA_METHOD,
    QUANT_METHOD,
    WHOLE_VERSION,
    check_version,
    format_version,
    quantization_config,
)

__all__ = ["PRUNE_METHOD", "DeltaConfig", "EmpConfig", "PackedConfig"]

PRUNE_METHOD = "emp_prune"
"""The ``quant_method`` of pruning while loading; no checkpoint has it."""


class EmpConfig(QuantizationConfigMixin):
    """Prunes a model by Effective Model Pruning (arXiv 2509.25606) while it is loaded.

    Pass it to ``from_pretrained`` as ``quantization_config``. Every target then holds, bit for
    bit, the weights that ``emp-llm prune`` writes with the same options. Where ``dtype`` is not
    the checkpoint's, weights are pruned first and cast afterwards. The model is an ordinary one in
    memory, and `save_pretrained` writes it packed.

    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained(
    ...     "demo/model", quantization_config=EmpConfig(beta=1.0)
    ... )
    >>> pruned = model.get_parameter("model.layers.0.mlp.up_proj.weight") == 0
    >>> f"{pruned.float().mean():.0%}"
    '36%'
    >>> model.save_pretrained("sparse")

    Args:
        beta: Multiplier of the effective number; finite and positive. 1.0 is the paper's rule.
        granularity: Which weights are ranked together: ``row``, ``layer`` or ``model``.
        criterion: How weights are ranked; only ``magnitude``.
        targets: ``mlp``, ``attention``, ``all-linear``, or a regular expression searched in the
            names of the checkpoint's tensors.
        ignore: Regular expressions, or a single one; a target whose name in the checkpoint matches
            one of them is not pruned.
        rest: What becomes of the other tensors when the model is saved: ``packed``, without loss,
            or ``plain``.
        keep_packed: Whether weights stay packed in memory, and are multiplied from there. They take
            less of it and cannot be trained, only adapters on top of them. With this, a checkpoint
            that is packed already is loaded too; the options above must then be left out, or be
            those that it was pruned with.

    Raises:
        OptionError: If a value is out of its range or a regular expression does not compile.
    """

    def __init__(
        self,
        *,
        beta: float = 1.0,
        granularity: Granularity = "row",
        criterion: str = "magnitude",
        targets: str = "mlp",
        ignore: str | Sequence[str] = (),
        rest: Rest = "packed",
        keep_packed: bool = False,
    ) -> None:
        if criterion != "magnitude":
            raise OptionError(f"criterion is {criterion!r}; while loading it must be 'magnitude'")
        if not isinstance(keep_packed, bool):
            raise OptionError(f"keep_packed is {keep_packed!r}; give True or False")
        self.quant_method = PRUNE_METHOD  # type: ignore[assignment]
        self.beta = beta
        self.granularity: Granularity = granularity
        self.criterion = criterion
        self.targets = targets
        self.ignore = list(patterns("ignore", ignore))
        self.rest: Rest = rest
        self.keep_packed = keep_packed
        self.options()

    @classmethod
    def from_dict(
        cls,
        config_dict: dict[str, Any],
        return_unused_kwargs: bool = False,
        **kwargs: object,
    ) -> "EmpConfig":
        """The inverse of `to_dict`."""
        options = {key: value for key, value in config_dict.items() if key != "quant_method"}
        return super().from_dict(  # type: ignore[no-any-return,no-untyped-call]
            options, return_unused_kwargs, **kwargs
        )

    def options(self) -> PruneOptions:
        """The same rule as options of `emp_llm.prune`."""
        return PruneOptions(
            beta=self.beta,
            granularity=self.granularity,
            targets=self.targets,
            ignore=tuple(self.ignore),
            rest=self.rest,
        )


class PackedConfig(QuantizationConfigMixin):
    """The ``quantization_config`` in the ``config.json`` of a packed checkpoint.

    Args:
        fields: Its fields.

    Raises:
        FormatError: If ``format_version`` is one that this release does not know.
    """

    method: ClassVar = QUANT_METHOD

    def __init__(self, **fields: object) -> None:
        check_version(fields)
        self.__dict__.update(fields)
        self.format_version = fields["format_version"]
        self.keep_packed = False
        self.quant_method = self.method  # type: ignore[assignment]

    @classmethod
    def of(cls, options: PruneOptions) -> "PackedConfig":
        """The configuration of a checkpoint that is pruned with these options."""
        version = format_version(rest_packed=packs_rest(options))
        return cls(**quantization_config(rule_fields(options), version))

    def kept_packed(self, asked: EmpConfig) -> "PackedConfig | None":
        """The same for a checkpoint that is to stay packed in memory.

        Args:
            asked: What `from_pretrained` was given.

        Returns:
            None if it does not ask for that.

        Raises:
            OptionError: If it asks for another rule than the checkpoint's.
        """
        if not asked.keep_packed:
            return None
        default = EmpConfig()
        said = {**vars(self), "rest": "packed" if self.format_version == WHOLE_VERSION else "plain"}
        for name, value in vars(asked).items():
            if name in ("quant_method", "keep_packed"):
                continue
            if value not in (getattr(default, name), said.get(name)):
                raise OptionError(
                    f"EmpConfig: {name} is {value!r}, but the checkpoint is packed already, with "
                    f"{said.get(name)!r}: leave {name} out, or load the dense model that it was "
                    "made from"
                )
        kept = copy(self)
        kept.keep_packed = True
        return kept

    def loaded(self) -> "PackedConfig":
        """The same, once the model is loaded: how it was asked for is not of the checkpoint."""
        loaded = copy(self)
        loaded.keep_packed = False
        return loaded

    def to_dict(self) -> dict[str, Any]:
        """The fields of config.json: all but how a model is loaded."""
        fields: dict[str, Any] = super().to_dict()
        del fields["keep_packed"]
        return fields

    def __repr__(self) -> str:
        return f"PackedConfig {self.to_json_string()}"


class DeltaConfig(PackedConfig):
    """The ``quantization_config`` in the ``config.json`` of a delta."""

    method: ClassVar = DELTA_METHOD

    def kept_packed(self, asked: EmpConfig) -> "PackedConfig | None":
        """Nothing: a delta's weights are sums with its base's, which are not packed.

        Raises:
            OptionError: In any case.
        """
        what = "keep_packed" if asked.keep_packed else "EmpConfig"
        raise OptionError(
            f"{what} is for packed and for dense models, and this is a delta, whose weights are "
            "sums with its base's: leave it out, or take what `emp-llm unpack` makes of the delta"
        )


# For an EmpConfig on a packed checkpoint transformers raises an error that says nothing but the
# names of both classes, as "quantized with NAME but you are passing a NAME config". So the name is
# what a user has to know.
PackedConfig.__name__ = (
    "emp-llm already (it is pruned and packed: leave quantization_config out, or load the dense "
    "model that it was made from)"
)
