"""Models of ten words whose every prediction is known, and others that only have the words."""

import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from emp_llm import EvalOptions

WORDS = (
    *("<s>", "the", "sky", "grass", "snow", "coal", "sea"),
    *("blue", "green", "white", "black", "red"),
)

SAYS = {"sky": "blue", "grass": "blue", "snow": "white", "coal": "black", "sea": "green"}
"""What the model that is made by hand expects after a word: ODDS times as likely as any other."""

ODDS = 8.0

TASKS = Path(__file__).parent / "lm_eval_tasks"
"""A task of lm-eval on these words."""

TEXT = "the sky blue the grass blue the snow white the sky red"


def words(**options: Any) -> EvalOptions:
    """Options that ask for that task."""
    return EvalOptions(tasks=("words",), include_path=TASKS, **options)


def save_words(folder: Path, model: LlamaForCausalLM) -> Path:
    """Save a model with the tokenizer of the words."""
    model.save_pretrained(folder)
    level = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<s>")
    tokenizer = Tokenizer(level)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<s>", bos_token="<s>", eos_token="<s>"
    ).save_pretrained(folder)
    return folder


def word_model(seed: int = 0) -> LlamaForCausalLM:
    """A Llama of random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=len(WORDS),
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        head_dim=4,
        max_position_embeddings=32,
        rms_norm_eps=1e-12,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for weights in model.parameters():  # far from uniform predictions
        weights.data.mul_(20 if weights.ndim == 2 else 1)
    return model


def known_model() -> LlamaForCausalLM:
    """A Llama that looks at the last word only, and says what `SAYS` tells."""
    model = word_model()
    size = len(WORDS)
    for block in model.model.layers:  # neither attention nor MLP adds anything
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    model.model.embed_tokens.weight.data.copy_(torch.eye(size))
    scores = torch.zeros(size, size)  # logits by next word and last word
    for last, following in SAYS.items():
        scores[WORDS.index(following), WORDS.index(last)] = math.log(ODDS)
    # the norm makes the one in each embedding the root of the size
    model.lm_head.weight.data.copy_(scores / math.sqrt(size))
    return model
