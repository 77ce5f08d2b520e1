"""The params.json of Meta's original Llama checkpoints, converted to a config of transformers.

params.json does not say which Llama it is; transformers' own converter asks its user. Here that is
recognized as follows:

    version   recognized by                                                longest context
    1         norm_eps 1e-06; or 65B: dim 8192 and no n_kv_heads                     2,048
    2         rope_theta 10,000 otherwise                                            4,096
    Code      any other rope_theta                                                  16,384
    3         rope_theta 500,000                                                     8,192
    3.1       the same and use_scaled_rope: the "llama3" scaling by 8              131,072
    3.2       the same, of dim 2048 and 16 layers or dim 3072 and 28: by 32        131,072
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from emp_llm.errors import CheckpointError
from emp_llm.messages import shortened

__all__ = ["PARAMS_NAME", "OriginalParams"]

PARAMS_NAME: Final = "params.json"

_THETA = 10_000.0
_THETA_3 = 500_000.0
_SIZES_3_2 = ((2048, 16), (3072, 28))
_MAX = 1 << 20
_MAX_NUMBER = 1e30


@dataclass(frozen=True, kw_only=True)
class OriginalParams:
    """A dense Llama, as Meta describes it.

    Attributes:
        dim: Hidden size.
        layers: Decoder layers.
        heads: Heads of the queries.
        kv_heads: Heads of keys and values; None if the file does not say, then as many as `heads`.
        norm_eps: Epsilon of the norms.
        rope_theta: Base of the rotary embedding.
        scaled_rope: Whether its frequencies are scaled, as they are since Llama 3.1.
    """

    dim: int
    layers: int
    heads: int
    kv_heads: int | None
    norm_eps: float
    rope_theta: float
    scaled_rope: bool

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "OriginalParams":
        """Check and take the content of params.json.

        Raises:
            CheckpointError: If a field that a dense Llama has is missing or impossible.
        """
        model = fields.get("model", fields)
        if not isinstance(model, Mapping):
            raise _wrong("model", model, "an object")
        kv_heads = model.get("n_kv_heads")
        params = cls(
            dim=_count(model, "dim"),
            layers=_count(model, "n_layers"),
            heads=_count(model, "n_heads"),
            kv_heads=None if kv_heads is None else _count(model, "n_kv_heads"),
            norm_eps=_number(model, "norm_eps"),
            rope_theta=_number({"rope_theta": _THETA, **model}, "rope_theta"),
            scaled_rope=model.get("use_scaled_rope") is True,
        )
        if params.dim % params.heads or params.head_dim % 2:
            raise _wrong("dim", params.dim, f"an even number for each of {params.heads} heads")
        if params.heads % params.key_heads:
            raise _wrong("n_kv_heads", params.kv_heads, f"a divisor of {params.heads} heads")
        return params

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.dim // self.heads

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def is_llama_3(self) -> bool:
        """Whether it is a Llama 3 or later."""
        return self.rope_theta == _THETA_3

    @property
    def context(self) -> int:
        """Positions that it was trained for."""
        if self.is_llama_3:
            return 131_072 if self.scaled_rope else 8_192
        if self.rope_theta != _THETA:  # Code Llama
            return 16_384
        # Llama 1 has this epsilon, except for 65B; Llama 2 70B, as wide, has n_kv_heads
        is_first = self.norm_eps == 1e-6 or (self.dim == 8192 and self.kv_heads is None)
        return 2_048 if is_first else 4_096

    def config(
        self, *, intermediate: int, vocabulary: int, dtype: str, tied: bool
    ) -> dict[str, Any]:
        """The content of config.json.

        Args:
            intermediate: Intermediate size of the MLPs.
            vocabulary: Tokens.
            dtype: The weights', as torch calls it.
            tied: Whether the output head is the embedding.
        """
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 128_000 if self.is_llama_3 else 1,
            "eos_token_id": 128_001 if self.is_llama_3 else 2,
            "hidden_size": self.dim,
            "intermediate_size": intermediate,
            "max_position_embeddings": self.context,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.key_heads,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": tied,
            "torch_dtype": dtype,
            "vocab_size": vocabulary,
        }
        if self.scaled_rope:
            config["rope_scaling"] = {
                "factor": 32.0 if (self.dim, self.layers) in _SIZES_3_2 else 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8_192,
                "rope_type": "llama3",
            }
        return config

    def generation_config(self) -> dict[str, Any]:
        """The content of generation_config.json that transformers' converter writes for Llamas."""
        config = self.config(intermediate=0, vocabulary=0, dtype="", tied=False)
        tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
        return {**tokens, "do_sample": True, "temperature": 0.6, "top_p": 0.9}


def _count(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or not 0 < value <= _MAX:
        raise _wrong(name, value, "a whole number from 1")
    return value


def _number(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if not isinstance(value, int | float) or not 0 < value < _MAX_NUMBER:
        raise _wrong(name, value, "a number above 0")
    return float(value)


def _wrong(name: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{PARAMS_NAME}: {name} is {shortened(value)}; for a dense Llama it must be {expected}: "
        "give the folder as Meta ships it, or the model in Hugging Face's layout"
    )
