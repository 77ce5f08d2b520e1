"""``EmpConfig`` for `from_pretrained`, and the configuration that packed checkpoints carry."""

from collections.abc import Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from emp_llm.errors import FormatError, OptionError
from emp_llm.options import Granularity, PruneOptions
from emp_llm.rule_fields import rule_fields
from emp_llm.tensors.packed_config import FORMAT_VERSION, QUANT_METHOD, quantization_config

__all__ = ["PRUNE_METHOD", "EmpConfig", "PackedConfig"]

PRUNE_METHOD = "emp_prune"
"""The method that transformers knows pruning while loading by; no checkpoint bears it."""


class EmpConfig(QuantizationConfigMixin):
    """Prunes a model by Effective Model Pruning (arXiv 2509.25606) while it is loaded.

    Pass it to ``from_pretrained`` as ``quantization_config``. Every target holds the weights then
    that ``emp-llm prune`` writes with the same options, bit for bit; with another ``dtype`` than
    the checkpoint's they are pruned first and cast then. `save_pretrained` writes them packed.

    Args:
        beta: Multiplier of the effective number; finite and positive. 1.0 is the paper's rule.
        granularity: What one group of weights is: ``row``, ``layer`` or ``model``.
        criterion: What weights are ranked by; ``magnitude``.
        targets: ``mlp``, ``attention``, ``all-linear``, or a regular expression searched in
            checkpoint tensor names.
        ignore: Regular expressions; a target whose checkpoint name one of them is found in is
            left as it is.

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
    ) -> None:
        if criterion != "magnitude":
            raise OptionError(f"criterion is {criterion!r}; while loading it can be 'magnitude'")
        self.quant_method = PRUNE_METHOD  # type: ignore[assignment]
        self.beta = beta
        self.granularity: Granularity = granularity
        self.criterion = criterion
        self.targets = targets
        self.ignore = [ignore] if isinstance(ignore, str) else list(ignore)
        self.options()

    @classmethod
    def from_dict(
        cls,
        config_dict: dict[str, Any],
        return_unused_kwargs: bool = False,
        **kwargs: Any,  # noqa: ANN401 (transformers' own signature)
    ) -> "EmpConfig":
        """The inverse of `to_dict`."""
        options = {key: value for key, value in config_dict.items() if key != "quant_method"}
        return super().from_dict(  # type: ignore[no-any-return,no-untyped-call]
            options, return_unused_kwargs, **kwargs
        )

    def options(self) -> PruneOptions:
        """The same as options of `emp_llm.prune`."""
        return PruneOptions(
            beta=self.beta,
            granularity=self.granularity,
            targets=self.targets,
            ignore=tuple(self.ignore),
        )


class PackedConfig(QuantizationConfigMixin):
    """What the ``quantization_config`` of a packed checkpoint says.

    Args:
        fields: Its fields.

    Raises:
        FormatError: If it is of a version of the format that this release does not know.
    """

    def __init__(self, **fields: Any) -> None:  # noqa: ANN401 (what config.json holds)
        version = fields.get("format_version")
        if version != FORMAT_VERSION:
            raise FormatError(
                f"config.json: the checkpoint is packed in version {version} of the format; this "
                f"emp-llm reads version {FORMAT_VERSION}: install a release that knows it"
            )
        self.__dict__.update(fields)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]

    @classmethod
    def of(cls, options: PruneOptions) -> "PackedConfig":
        """The configuration of a checkpoint that is pruned with these options."""
        return cls(**quantization_config(rule_fields(options)))

    def __repr__(self) -> str:
        return f"PackedConfig {self.to_json_string()}"


# transformers refuses an EmpConfig for a packed checkpoint, and says no more than the two names.
PackedConfig.__name__ = (
    "emp-llm already (it is pruned and packed: leave quantization_config out, or load the dense "
    "model that it was made from)"
)
