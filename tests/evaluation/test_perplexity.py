import dataclasses
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from emp_llm.errors import OptionError
from emp_llm.evaluation import perplexity as module
from emp_llm.evaluation.perplexity import perplexity
from emp_llm.texts.texts import Text

DEMO = Path(__file__).parents[2] / "demo"
WORDS = ["<s>", "the", "weights", "say", "how", "many", "é"]
TEXT = "the weights say how many the é weights say the"  # ten tokens, é is two bytes


@pytest.fixture
def tokenizer():
    """A token for every word; no special tokens."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(WORDS), num_hidden_layers=2, max_position_embeddings=16, **shape
    )
    llama = LlamaForCausalLM(config)
    for weights in llama.parameters():  # far from uniform predictions, so that mistakes show
        weights.data.mul_(8)
    return llama


def ids_of(text):
    return [WORDS.index(word) for word in text.split()]


def mean_loss(model, ids):
    """The mean loss of one block, token by token."""
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([ids])).logits[0].float()
    losses = []
    for position in range(len(ids) - 1):
        losses.append(cross_entropy(logits[position], torch.tensor(ids[position + 1])).item())
    return sum(losses) / len(losses)


def test_blocks_count_by_their_tokens_and_the_partial_last_block_counts(model, tokenizer):
    ids = ids_of(TEXT)
    first, second, third = (mean_loss(model, ids[a:b]) for a, b in [(0, 4), (4, 8), (8, 10)])

    result = perplexity(model, tokenizer, TEXT, context=4)

    nats = (4 * first + 4 * second + 2 * third) / 10
    assert result.nats_per_token == pytest.approx(nats, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats), rel=1e-6)
    assert (result.tokens, result.context) == (10, 4)


def test_equal_blocks_give_the_papers_formula(model, tokenizer):
    ids = ids_of(TEXT)
    losses = [mean_loss(model, ids[0:5]), mean_loss(model, ids[5:10])]

    result = perplexity(model, tokenizer, TEXT, context=5)

    assert result.perplexity == pytest.approx(math.exp(sum(losses) / 2), rel=1e-6)


def test_a_last_block_of_one_token_is_left_out(model, tokenizer):
    ids = ids_of(TEXT)

    result = perplexity(model, tokenizer, TEXT, context=9)

    assert result.tokens == 9
    assert result.nats_per_token == pytest.approx(mean_loss(model, ids[:9]), rel=1e-6)


def test_a_text_shorter_than_the_context_is_one_block(model, tokenizer):
    result = perplexity(model, tokenizer, "the weights", context=16)

    assert result.tokens == 2
    assert result.nats_per_token == pytest.approx(mean_loss(model, [1, 2]), rel=1e-6)


def test_bits_per_byte_spreads_the_bits_of_predicted_tokens_over_utf8_bytes(model, tokenizer):
    ids = ids_of(TEXT)
    first, second, third = (mean_loss(model, ids[a:b]) for a, b in [(0, 4), (4, 8), (8, 10)])

    result = perplexity(model, tokenizer, TEXT, context=4)

    nats = 3 * first + 3 * second + 1 * third
    assert len(TEXT) == 46
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / 47, rel=1e-6)


def test_uniform_predictions_have_the_vocabulary_as_perplexity(model, tokenizer):
    model.lm_head.weight.data.zero_()

    result = perplexity(model, tokenizer, TEXT, context=4)

    assert result.perplexity == pytest.approx(len(WORDS), rel=1e-6)


def test_a_bfloat16_model_is_scored_in_float32_from_its_own_logits(model, tokenizer):
    model.bfloat16()

    result = perplexity(model, tokenizer, TEXT, context=10)

    assert result.nats_per_token == pytest.approx(mean_loss(model, ids_of(TEXT)), rel=1e-6)


@pytest.mark.parametrize("rows", [1, 4, 9, 100])
def test_the_slices_of_the_logits_do_not_change_the_result(monkeypatch, model, tokenizer, rows):
    whole = mean_loss(model, ids_of(TEXT))
    monkeypatch.setattr(module, "_SLICE_ELEMENTS", rows * len(WORDS))

    result = perplexity(model, tokenizer, TEXT, context=10)

    assert result.nats_per_token == pytest.approx(whole, rel=1e-6)


def test_special_tokens_that_the_tokenizer_adds_come_once_for_the_whole_text(model, tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    ids = [0, *ids_of(TEXT)]

    result = perplexity(model, tokenizer, TEXT, context=6)

    nats = (6 * mean_loss(model, ids[:6]) + 5 * mean_loss(model, ids[6:])) / 11
    assert result.nats_per_token == pytest.approx(nats, rel=1e-6)


def test_an_overflowing_perplexity_is_infinite(model, tokenizer):
    model.lm_head.weight.data.mul_(1e6)

    result = perplexity(model, tokenizer, TEXT, context=4)

    assert math.isfinite(result.nats_per_token)
    assert result.perplexity == math.inf


def test_a_model_that_computes_nan_has_a_nan_perplexity(model, tokenizer):
    model.lm_head.weight.data.fill_(math.nan)

    assert math.isnan(perplexity(model, tokenizer, TEXT, context=4).perplexity)


def test_dropout_is_off_while_measuring_and_every_mode_is_restored(tokenizer):
    config = GPT2Config(vocab_size=len(WORDS), n_positions=16, n_embd=16, n_layer=1, n_head=2)
    gpt2 = GPT2LMHeadModel(config).train()
    gpt2.transformer.h[0].mlp.train(mode=False)
    before = {name: part.training for name, part in gpt2.named_modules()}

    first = perplexity(gpt2, tokenizer, TEXT, context=4)
    second = perplexity(gpt2, tokenizer, TEXT, context=4)

    assert first == second
    assert {name: part.training for name, part in gpt2.named_modules()} == before
    assert len(set(before.values())) == 2


def test_the_mode_is_restored_after_a_failure(monkeypatch, model, tokenizer):
    def fail(*_args, **_kwargs):
        raise RuntimeError

    monkeypatch.setattr(model.model, "forward", fail)
    model.train()

    with pytest.raises(RuntimeError):
        perplexity(model, tokenizer, TEXT, context=4)

    assert all(part.training for part in model.modules())


def test_measuring_leaves_no_gradients(model, tokenizer):
    perplexity(model, tokenizer, TEXT, context=4)

    assert torch.is_grad_enabled()
    assert all(weights.grad is None for weights in model.parameters())


def test_a_text_past_the_tokenizers_length_is_not_truncated_and_logs_nothing(
    model, tokenizer, caplog
):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        result = perplexity(model, tokenizer, TEXT, context=4)
    finally:
        logger.removeHandler(caplog.handler)

    assert result.tokens == 10 > tokenizer.model_max_length
    assert caplog.records == []


@pytest.mark.parametrize("context", [-1, 0, 1])
def test_a_context_that_predicts_nothing_is_refused(model, tokenizer, context):
    with pytest.raises(OptionError, match=f"context is {context}; .*give 2 or more"):
        perplexity(model, tokenizer, TEXT, context=context)


def test_a_context_past_the_models_positions_is_refused(model, tokenizer):
    with pytest.raises(OptionError, match="context is 17; this model has 16 positions"):
        perplexity(model, tokenizer, TEXT, context=17)


def test_the_whole_range_of_positions_can_be_used(model, tokenizer):
    assert perplexity(model, tokenizer, TEXT, context=16).context == 16


@pytest.mark.parametrize(("text", "tokens"), [("", 0), ("the", 1)])
def test_a_text_with_nothing_to_predict_is_refused(model, tokenizer, text, tokens):
    with pytest.raises(OptionError, match=f"text is {tokens} tokens long"):
        perplexity(model, tokenizer, text, context=4)


def test_the_result_is_frozen(model, tokenizer):
    result = perplexity(model, tokenizer, TEXT, context=4)

    with pytest.raises(dataclasses.FrozenInstanceError):
        result.tokens = 0


def test_gptq_scores_full_blocks_only(model, tokenizer):
    ids = ids_of(TEXT)
    losses = [mean_loss(model, ids[0:4]), mean_loss(model, ids[4:8])]

    result = perplexity(model, tokenizer, TEXT, context=4, protocol="gptq")

    assert result.perplexity == pytest.approx(math.exp(sum(losses) / 2), rel=1e-6)
    assert (result.tokens, result.protocol) == (8, "gptq")


def test_gptqs_bits_are_spread_over_the_bytes_of_its_windows(model, tokenizer):
    ids = ids_of(TEXT)
    nats = 3 * mean_loss(model, ids[0:4]) + 3 * mean_loss(model, ids[4:8])

    result = perplexity(model, tokenizer, TEXT, context=4, protocol="gptq")

    nbytes = len("the weights say how many the é weights".encode())
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / nbytes, rel=1e-6)


def test_without_offsets_bytes_are_shared_out_by_tokens(monkeypatch, model, tokenizer):
    """Eight of ten tokens: 36 of the 46 characters, one of them of two bytes."""
    whole = perplexity(model, tokenizer, TEXT, context=4, protocol="gptq").bits_per_byte
    monkeypatch.setattr(type(tokenizer), "is_fast", False)

    result = perplexity(model, tokenizer, TEXT, context=4, protocol="gptq")

    assert result.bits_per_byte == pytest.approx(whole * 39 / 37, rel=1e-9)


def test_a_text_can_limit_its_windows(model, tokenizer):
    result = perplexity(model, tokenizer, Text("c4", TEXT, 1), context=4, protocol="gptq")

    assert result.tokens == 4
    assert result.nats_per_token == pytest.approx(mean_loss(model, ids_of(TEXT)[:4]), rel=1e-6)


def test_gptq_refuses_a_text_shorter_than_a_window(model, tokenizer):
    with pytest.raises(OptionError, match=r"text is 10 tokens long, shorter than .*window of 11"):
        perplexity(model, tokenizer, TEXT, context=11, protocol="gptq")


def test_an_unknown_protocol_is_refused(model, tokenizer):
    with pytest.raises(OptionError, match="protocol is 'wanda'; choose one of paper, gptq"):
        perplexity(model, tokenizer, TEXT, context=4, protocol="wanda")


def test_the_tokenizer_of_a_larger_model_is_refused(model, tokenizer):
    tokenizer.add_tokens(["new"])

    with pytest.raises(OptionError, match="token 7 for text, the model has 7 embeddings"):
        perplexity(model, tokenizer, "the new", context=4)


def test_progress_is_told_in_tokens_block_by_block(model, tokenizer):
    told = []

    class Told:
        def begin(self, stage, total, unit="B"):
            told.append((stage, total, unit))

        def advance(self, count):
            told.append(count)

    perplexity(model, tokenizer, Text("short", TEXT), context=4, progress=Told())

    assert told == [("perplexity of short", 10, "tokens"), 4, 4, 2]


def test_importing_the_module_imports_neither_torch_nor_transformers():
    code = (
        "import sys, emp_llm.evaluation.perplexity\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )

    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert ran.stdout.strip() == "set()"


def test_the_demo_model_predicts_the_demo_text_as_only_a_trained_model_can():
    """Knowing no more than how often each token comes costs a perplexity of several hundred."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model")
    text = (DEMO / "text.txt").read_text(encoding="utf-8")[:20_000]

    result = perplexity(model, tokenizer, text, context=256)

    assert result.perplexity < 60


@pytest.mark.parametrize("protocol", ["paper", "gptq"])
def test_both_protocols_agree_with_a_computation_step_by_step(protocol):
    """From the logits on in float64, one token after the other, as the papers' scripts do it."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    text = (DEMO / "text.txt").read_text(encoding="utf-8")[:6_000]
    ids = torch.tensor(tokenizer(text)["input_ids"])
    full, rest = divmod(len(ids), 256)
    assert full > 2
    assert rest > 1
    means, sizes, bits = [], [], 0.0
    for start in range(0, len(ids), 256):
        block = ids[start : start + 256]
        if protocol == "gptq" and len(block) < 256:
            continue
        with torch.no_grad():
            logits = model(block[None]).logits[0].double()
        total = 0.0
        for position in range(len(block) - 1):
            scores = logits[position].exp()
            total -= (scores[block[position + 1]] / scores.sum()).log().item()
        means.append(total / (len(block) - 1))
        sizes.append(len(block))
        bits += total / math.log(2)
    nats = sum(n * mean for n, mean in zip(sizes, means, strict=True)) / sum(sizes)
    scored = text if protocol == "paper" else tokenizer.decode(ids[: full * 256])

    result = perplexity(model, tokenizer, text, context=256, protocol=protocol)

    assert result.perplexity == pytest.approx(math.exp(nats), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(bits / len(scored.encode()), rel=1e-5)
    assert result.tokens == sum(sizes)


def test_the_demo_tokenizer_gives_the_demo_text_back():
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    text = (DEMO / "text.txt").read_text(encoding="utf-8")

    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.decode(tokenizer(text, verbose=False)["input_ids"]) == text
