"""The tokenizer of a Llama in Meta's format becomes one of transformers that says the same."""

import base64
import importlib.util
import io
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from support.checkpoints import refusal
from support.original_llamas import params, whole_model, write_original
from transformers import AutoTokenizer

from emp_llm import inspect, prune
from emp_llm.checkpoint.meta_llama.tokenizer import special_tokens

SENTENCES = (
    "The effective number of weights says how many of them to keep.",
    "Rows lie one after the other; columns do not.",
    "A model is pruned shard by shard, while the next one downloads.",
)
TEXTS = (*SENTENCES, "Zwölf Boxkämpfer jagen\nEva  quer 123456 über", "日本語 and 🙂", "")
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def original(folder: Path, tokenizer: bytes, **fields: object) -> Path:
    write_original(folder, params(**fields), whole_model())
    (folder / "tokenizer.model").write_bytes(tokenizer)
    return folder


def sentencepiece_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 9),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    return model.getvalue()


def ranks() -> dict[bytes, int]:
    tokens = [bytes([value]) for value in range(256)]
    tokens += [b"th", b"he", b" w", b"the", b" we", b"ow", b" the", b"12", b"\xc3\xbc"]
    return {token: rank for rank, token in enumerate(tokens)}


def tiktoken_list() -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks().items())


def test_a_model_of_sentencepiece_encodes_as_before(tmp_path: Path) -> None:
    source = original(tmp_path / "llama", sentencepiece_model())
    prune(source, tmp_path / "out")
    converted = AutoTokenizer.from_pretrained(tmp_path / "out")
    metas = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    for text in TEXTS:
        assert converted(text).input_ids == [metas.bos_id(), *metas.encode(text)]
        assert converted.decode(metas.encode(text)) == metas.decode(metas.encode(text))
    assert (converted.bos_token_id, converted.eos_token_id) == (1, 2)


def test_a_list_of_tiktoken_encodes_as_before(tmp_path: Path) -> None:
    more = {"rope_theta": 500_000.0, "use_scaled_rope": True}
    source = original(tmp_path / "llama", tiktoken_list(), **more)
    prune(source, tmp_path / "out")
    converted = AutoTokenizer.from_pretrained(tmp_path / "out")
    numbers = {name: len(ranks()) + i for i, name in enumerate(special_tokens(scaled_rope=True))}
    metas = tiktoken.Encoding(
        "llama", pat_str=PATTERN, mergeable_ranks=ranks(), special_tokens=numbers
    )
    for text in TEXTS:
        assert converted(text).input_ids == [numbers["<|begin_of_text|>"], *metas.encode(text)]
    ends = "<|eot_id|><|end_of_text|>"
    found = converted(ends, add_special_tokens=False).input_ids
    assert found == [numbers["<|eot_id|>"], numbers["<|end_of_text|>"]]
    assert converted.eos_token == "<|end_of_text|>"
    assert converted.model_max_length == 131_072


def test_llama_3_has_256_special_tokens_with_metas_numbers() -> None:
    first, later = special_tokens(scaled_rope=False), special_tokens(scaled_rope=True)
    assert len(set(first)) == len(set(later)) == 256
    assert [first.index(f"<|{name}|>") for name in ("end_header_id", "eot_id")] == [7, 9]
    assert [later.index(f"<|{name}|>") for name in ("eom_id", "eot_id", "python_tag")] == [8, 9, 10]
    assert first[255] == "<|reserved_special_token_250|>"
    assert later[255] == "<|reserved_special_token_247|>"


def test_a_missing_package_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = original(tmp_path / "llama", b"\n\x0e\n")
    find = importlib.util.find_spec
    hidden = ("sentencepiece", "tiktoken")
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n in hidden else find(n))
    assert "needs sentencepiece, not installed here: pip install sentencepiece" in refusal(
        source, tmp_path / "out"
    )
    (source / "tokenizer.model").write_bytes(tiktoken_list())
    assert "pip install tiktoken" in refusal(source, tmp_path / "out")
    assert inspect(source)["totals"]["targets"]["tensors"] == 6


def test_a_damaged_tokenizer_is_one_clear_error(tmp_path: Path) -> None:
    source = original(tmp_path / "llama", b"\x00" * 50)
    message = refusal(source, tmp_path / "out")
    assert "tokenizer.model: transformers cannot convert it: " in message
    (source / "tokenizer.model").write_bytes(b"")
    assert "tokenizer.model: is empty" in refusal(source, tmp_path / "out")


def test_a_tokenizer_that_is_there_already_is_taken(tmp_path: Path) -> None:
    source = original(tmp_path / "llama", b"\x00")
    (source / "tokenizer.json").write_text("{}")
    prune(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
