"""What must be pruned in the tiny models of architectures.py, written down by hand."""

from typing import NamedTuple


def names(prefix, *leaves):
    return [prefix + leaf + ".weight" for leaf in leaves]


def both_layers(prefix, *leaves):
    """Names in layers 0 and 1; the prefix has a {} where the layer's number goes."""
    return [name for i in range(2) for name in names(prefix.format(i), *leaves)]


def experts(prefix, *leaves):
    """Names in experts 0 to 3; the prefix has a {} where the expert's number goes."""
    return [name for i in range(4) for name in names(prefix.format(i), *leaves)]


class Expected(NamedTuple):
    """Names of the tensors pruned by each target, of the transposed ones, and all kinds."""

    mlp: list[str]
    attention: list[str]
    transposed: list[str] = []  # noqa: RUF012
    kinds: list[str] = []  # noqa: RUF012


GATED = ("gate_proj", "up_proj", "down_proj")
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")

LLAMA = Expected(
    mlp=both_layers("model.layers.{}.mlp.", *GATED),
    attention=both_layers("model.layers.{}.self_attn.", *QKVO),
    kinds=["gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"],
)
BERT_MLP = ("intermediate.dense", "output.dense")
BERT_ATTENTION = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
)
BERT_KINDS = ["query", "key", "value", *BERT_MLP, "attention.output.dense"]
DEEPSEEK = Expected(
    mlp=[
        *names("model.layers.0.mlp.", *GATED),
        *experts("model.layers.1.mlp.experts.{}.", *GATED),
        *names("model.layers.1.mlp.shared_experts.", *GATED),
    ],
    attention=both_layers("model.layers.{}.self_attn.", *LATENT),
    kinds=[
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        *("experts.gate_proj", "experts.up_proj", "experts.down_proj"),
        *("shared_experts.gate_proj", "shared_experts.up_proj", "shared_experts.down_proj"),
        *LATENT,
    ],
)

EXPECTED = {
    "llama": LLAMA,
    "llama-tied": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3": LLAMA,
    "phi": Expected(
        mlp=both_layers("model.layers.{}.mlp.", "fc1", "fc2"),
        attention=both_layers("model.layers.{}.self_attn.", "q_proj", "k_proj", "v_proj", "dense"),
        kinds=["fc1", "fc2", "q_proj", "k_proj", "v_proj", "dense"],
    ),
    "phi3": Expected(
        mlp=both_layers("model.layers.{}.mlp.", "gate_up_proj", "down_proj"),
        attention=both_layers("model.layers.{}.self_attn.", "qkv_proj", "o_proj"),
        kinds=["gate_up_proj", "down_proj", "qkv_proj", "o_proj"],
    ),
    "gpt2": Expected(
        mlp=both_layers("transformer.h.{}.mlp.", "c_fc", "c_proj"),
        attention=both_layers("transformer.h.{}.attn.", "c_attn", "c_proj"),
        transposed=both_layers(
            "transformer.h.{}.", "mlp.c_fc", "mlp.c_proj", "attn.c_attn", "attn.c_proj"
        ),
        kinds=["c_fc", "mlp.c_proj", "c_attn", "attn.c_proj"],
    ),
    "gpt-neox": Expected(
        mlp=both_layers("gpt_neox.layers.{}.mlp.", "dense_h_to_4h", "dense_4h_to_h"),
        attention=both_layers("gpt_neox.layers.{}.attention.", "query_key_value", "dense"),
        kinds=["dense_h_to_4h", "dense_4h_to_h", "query_key_value", "dense"],
    ),
    "opt": Expected(
        mlp=both_layers("model.decoder.layers.{}.", "fc1", "fc2"),
        attention=both_layers(
            "model.decoder.layers.{}.self_attn.", "q_proj", "k_proj", "v_proj", "out_proj"
        ),
        kinds=["fc1", "fc2", "q_proj", "k_proj", "v_proj", "out_proj"],
    ),
    "falcon": Expected(
        mlp=both_layers("transformer.h.{}.mlp.", "dense_h_to_4h", "dense_4h_to_h"),
        attention=both_layers("transformer.h.{}.self_attention.", "query_key_value", "dense"),
        kinds=["dense_h_to_4h", "dense_4h_to_h", "query_key_value", "dense"],
    ),
    "bert": Expected(
        mlp=both_layers("bert.encoder.layer.{}.", *BERT_MLP),
        attention=both_layers("bert.encoder.layer.{}.", *BERT_ATTENTION),
        kinds=BERT_KINDS,
    ),
    "roberta": Expected(
        mlp=both_layers("roberta.encoder.layer.{}.", *BERT_MLP),
        attention=both_layers("roberta.encoder.layer.{}.", *BERT_ATTENTION),
        kinds=BERT_KINDS,
    ),
    "t5": Expected(
        mlp=[
            *names("encoder.block.0.layer.1.DenseReluDense.", "wi", "wo"),
            *names("decoder.block.0.layer.2.DenseReluDense.", "wi", "wo"),
        ],
        attention=[
            *names("encoder.block.0.layer.0.SelfAttention.", *"qkvo"),
            *names("decoder.block.0.layer.0.SelfAttention.", *"qkvo"),
            *names("decoder.block.0.layer.1.EncDecAttention.", *"qkvo"),
        ],
        kinds=[
            *("wi", "wo"),
            *("SelfAttention." + leaf for leaf in "qkvo"),
            *("EncDecAttention." + leaf for leaf in "qkvo"),
        ],
    ),
    "mixtral": Expected(
        mlp=[
            *experts("model.layers.0.block_sparse_moe.experts.{}.", "w1", "w2", "w3"),
            *experts("model.layers.1.block_sparse_moe.experts.{}.", "w1", "w2", "w3"),
        ],
        attention=LLAMA.attention,
        kinds=["experts.w1", "experts.w2", "experts.w3", *QKVO],
    ),
    "qwen2-moe": Expected(
        mlp=[
            *names("model.layers.0.mlp.", *GATED),
            *experts("model.layers.1.mlp.experts.{}.", *GATED),
            *names("model.layers.1.mlp.shared_expert.", *GATED),
        ],
        attention=LLAMA.attention,
        kinds=[
            *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
            *("experts.gate_proj", "experts.up_proj", "experts.down_proj"),
            *("shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"),
            *QKVO,
        ],
    ),
    "qwen3-moe": Expected(
        mlp=[
            *experts("model.layers.0.mlp.experts.{}.", *GATED),
            *experts("model.layers.1.mlp.experts.{}.", *GATED),
        ],
        attention=LLAMA.attention,
        kinds=["experts.gate_proj", "experts.up_proj", "experts.down_proj", *QKVO],
    ),
    "deepseek-v2": DEEPSEEK,
    "deepseek-v3": DEEPSEEK,
    "gpt-oss": Expected(
        mlp=[
            "model.layers.0.mlp.experts.gate_up_proj",
            "model.layers.0.mlp.experts.down_proj",
            "model.layers.1.mlp.experts.gate_up_proj",
            "model.layers.1.mlp.experts.down_proj",
        ],
        attention=LLAMA.attention,
        transposed=[
            "model.layers.0.mlp.experts.gate_up_proj",
            "model.layers.0.mlp.experts.down_proj",
            "model.layers.1.mlp.experts.gate_up_proj",
            "model.layers.1.mlp.experts.down_proj",
        ],
        kinds=["experts.gate_up_proj", "experts.down_proj", *QKVO],
    ),
    "llama4": Expected(
        mlp=[
            *names("model.layers.0.feed_forward.", *GATED),
            "model.layers.1.feed_forward.experts.gate_up_proj",
            "model.layers.1.feed_forward.experts.down_proj",
            *names("model.layers.1.feed_forward.shared_expert.", *GATED),
        ],
        attention=LLAMA.attention,
        transposed=[
            "model.layers.1.feed_forward.experts.gate_up_proj",
            "model.layers.1.feed_forward.experts.down_proj",
        ],
        kinds=[
            *("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"),
            *("experts.gate_up_proj", "experts.down_proj"),
            *("shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"),
            *QKVO,
        ],
    ),
    "jamba": Expected(
        mlp=[
            *names("model.layers.0.mamba.", "in_proj", "x_proj", "dt_proj", "out_proj"),
            *names("model.layers.0.feed_forward.", *GATED),
            *experts("model.layers.1.feed_forward.experts.{}.", *GATED),
        ],
        attention=names("model.layers.1.self_attn.", *QKVO),
        kinds=[
            *("in_proj", "x_proj", "dt_proj", "out_proj"),
            *("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"),
            *("experts.gate_proj", "experts.up_proj", "experts.down_proj"),
            *QKVO,
        ],
    ),
    "llava": Expected(
        mlp=[
            *both_layers("language_model.model.layers.{}.mlp.", *GATED),
            *both_layers("vision_tower.encoder.layers.{}.mlp.", "fc1", "fc2"),
        ],
        attention=[
            *both_layers("language_model.model.layers.{}.self_attn.", *QKVO),
            *both_layers(
                "vision_tower.encoder.layers.{}.self_attn.",
                *("q_proj", "k_proj", "v_proj", "out_proj"),
            ),
        ],
        kinds=[*GATED, "fc1", "fc2", *QKVO, "out_proj"],
    ),
}
