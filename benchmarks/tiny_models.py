"""A tiny model of any class of transformers, made by shrinking the default values of its config.

    model = make_model("Qwen2MoeForCausalLM")

Counts and sizes are recognised by the names of the config's fields, in the config and in those
that it holds; `CORRECTIONS` has what some models need besides. All weights are Gaussian.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

# the tasks of transformers' auto classes whose models are language, masked, seq2seq,
# vision-language or speech models
TASKS = (
    *("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"),
    *("SPEECH_SEQ_2_SEQ", "CTC", "TEXT_ENCODING"),
)
V, H, F = 64, 32, 48  # tokens, hidden size, size of the MLP
_MOST = 4_000_000  # parameters; a model that has more was not shrunk in earnest

# what a field becomes, if it is larger: by the first pattern found in its name
_SIZES = (
    (r"type_vocab|segment_types|prompt_types", 4),
    (r"vocab|num_embeddings$|codebook_size|codevectors|num_embeds$", V),
    (r"(kv|key_value)_heads$|kv_n_heads", 2),
    (r"heads?$", 4),
    (r"head_?dim|head_size|d_kv$|dim_head|d_head|kv_channels|projection_head", 8),
    (r"topk_group", 1),
    (r"per_tok|top_?k", 2),
    (r"n_groups?$", 2),
    (r"shared_experts?$", 1),
    (r"experts?(_num)?$", 4),
    (r"intermediate|inner_size|ffn_(dim|size|hidden)|(d|dim)_ff$|dff$|d_inner$|mlp_dim|n_inner", F),
    (r"lora_rank|_rank$", 8),
    (r"layers?$|depths?$|num_blocks?$|num_.*blocks?$", 2),
    (r"interval|period|frequency|sparse_step|every", 2),
    (r"image_size|crop_size|img_size", 32),
    (r"patch_size", 8),
    (r"position|n_ctx|max_seq_len|context_(length|size)|max_temporal", V),
    (r"filters$", 8),
    (r"channel_mult|ch_mult", 1),
    (r"(?<!num_)(?<!in_)(channels?|d_latents|widths?)$", H),
    (r"(hidden|embedding|emb|feature|input|output|projection|proj|latent|state)_sizes?$", H),
    (r"d_model|n_embd|embd|dims?$|_units$", H),
)

_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}  # twice the hidden size
_SPEECH = {"num_filters": 8, "downsampling_ratios": (2, 2), "depths": (1, 1, 1)}

# fields that are set to something else, by the name of a config's class or of a model's
CORRECTIONS: dict[str, dict[str, Any]] = {
    "BambaConfig": _MAMBA,
    "ChameleonConfig": {"vocabulary_map": {"<image>": 3}},
    "CohereCompassTextConfig": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "Cosmos3EdgeTextConfig": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    },
    "DbrxAttentionConfig": {"rope_theta": 1e4},
    "DeepseekOcr2SamVisionConfig": {"downsample_channels": [32, 32]},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "DiffusionGemmaTextConfig": {
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": F,
    },
    "Dots1Config": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "Dots3NoteTextConfig": {"num_key_value_heads": 4, "per_layer_config": {}},
    "Dots3NoteVisionConfig": {"per_layer_config": {}},
    "Emu3Config": {"vocabulary_map": {"<image>": 3, "<|extra_200|>": 4}},
    "Ernie4_5_VLMoeTextConfig": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    },
    "EsmConfig": {"vocab_size": V, "mask_token_id": 32, "pad_token_id": 1},
    "FalconH1Config": {**_MAMBA, "mamba_d_ssm": 64},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": H // 4},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nTextConfig": {
        "intermediate_size": F,
        "activation_sparsity_pattern": [0.0, 0.0],
        "num_kv_shared_layers": 0,
    },
    "Gemma4AssistantConfig": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 2,
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "full_attention"],
        }
    },
    "Gemma4UnifiedAssistantConfig": {
        "text_config": {
            "num_kv_shared_layers": 2,
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "full_attention"],
        }
    },
    "Glm5NextTextConfig": {"num_key_value_heads": 4, "index_topk": 16},
    "Granite4VisionConfig": {
        "deepstack_layer_map": [(0, 0), (1, 1)],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
    },
    "GraniteMoeHybridConfig": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "HunYuanDenseV1Config": {"head_dim": 8},
    "HunYuanMoEV1Config": {"head_dim": 8},
    "HunYuanVLTextConfig": {"head_dim": 8},
    "InklingVisionConfig": {"patch_size": 8},
    "JambaConfig": {"attn_layer_offset": 1},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Mamba2Config": {"num_heads": 4, "head_dim": 16},
    "MimiConfig": {"upsample_groups": 32},
    "MinistralConfig": {"head_dim": 8},
    "Molmo2AdapterConfig": {"vision_feature_layer": [1, 0]},
    "MoonshineStreamingConfig": {"num_key_value_heads": 4},
    "MuseSparkAudioConfig": {"num_hidden_layers": 4},
    "NemotronConfig": {"num_key_value_heads": 2},
    "NemotronH_Omni_Reasoning_V3_Config": {"vision_config": {"video_temporal_patch_size": 2}},
    "NeoMMEConfig": {"head_dim": 16},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": F},
    "ReformerConfig": {"axial_pos_embds_dim": (8, 24), "axial_pos_shape": (8, 8)},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "VibeVoiceAcousticTokenizerConfig": _SPEECH,
    "VibeVoiceAcousticTokenizerEncoderConfig": _SPEECH,
    "VibeVoiceAcousticTokenizerDecoderConfig": _SPEECH,
    "Wav2Vec2BertConfig": {"vocab_size": V},
    "Wav2Vec2ConformerConfig": {"vocab_size": V},
    "Zamba2Config": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid"] * 3},
    "ZambaConfig": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
}


def model_classes() -> list[str]:
    """Names of the classes of all `TASKS`, in the order of the alphabet."""
    found: set[str] = set()
    for task in TASKS:
        for classes in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values():
            found.update((classes,) if isinstance(classes, str) else classes)
    return sorted(found)


def tiny_config(config_class: type[PretrainedConfig], **given: object) -> PretrainedConfig:
    """A config whose model is tiny.

    Args:
        config_class: Its class.
        given: Fields that are not shrunk.
    """
    return config_class(**_tiny_fields(config_class, given))


def _tiny_fields(config_class: type[PretrainedConfig], given: Mapping[str, Any]) -> dict[str, Any]:
    small = {**CORRECTIONS.get(config_class.__name__, {}), **given}
    default = vars(_default(config_class, small))
    for field in dataclasses.fields(config_class):
        name, value = field.name, default.get(field.name)
        if isinstance(value, PretrainedConfig):
            small[name] = tiny_config(type(value), **small.get(name, {}))
            continue
        # None stays: the config derives those values from others, which are small
        if field.default is not dataclasses.MISSING:
            value = field.default
        if name not in small and _small(name, value) != value:
            small[name] = _small(name, value)
    return small


def _default(config_class: type[PretrainedConfig], given: Mapping[str, Any]) -> PretrainedConfig:
    """A config of the size that transformers gives it."""
    try:
        return config_class()
    except Exception:  # some have a part that has to be given
        return config_class(**given)


def _small(name: str, value: object) -> object:
    """A smaller value of a field."""
    if isinstance(value, list | tuple):
        return type(value)(_small(name, item) for item in value)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if re.search(r"_(id|index|ids)$", name):
        # tokens have to be in the small vocabulary, and different from each other if possible
        return value if value < V else 3 + sum(name.encode()) % (V - 3)
    size = next((size for pattern, size in _SIZES if re.search(pattern, name)), value)
    return min(size, value)


def make_model(name: str, *, seed: int = 0) -> PreTrainedModel:
    """Make a tiny model in bfloat16.

    Args:
        name: Of its class.
        seed: Of its weights and floating-point buffers.

    Raises:
        ValueError: If it is not tiny.
        Exception: Whatever transformers raises for its config.
    """
    model_class = getattr(transformers, name)
    config = tiny_config(model_class.config_class, **CORRECTIONS.get(name, {}))
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    if count > _MOST:
        raise ValueError(f"has {count:,} parameters: not tiny")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config)
        for tensor in _floating(model):
            torch.nn.init.normal_(tensor, std=0.05)
    return model.to(torch.bfloat16).eval()


def _floating(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """The tensors of a model that are saved, if they are floating-point."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            yield tensor
