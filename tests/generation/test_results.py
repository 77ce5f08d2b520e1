"""Rates and where texts part, worked out by hand."""

import json
from typing import Any

import pytest

from emp_llm.generation.options import GenerateOptions
from emp_llm.generation.results import Agreement, Generated, Generation


def generated(text: str, *new_ids: int, **fields: Any) -> Generated:
    given: dict[str, Any] = {
        "model": "m",
        "revision": None,
        "weights": "dense",
        "dtype": "bfloat16",
        "device": "cpu",
        "threads": 1,
        "prompt_ids": (5, 6, 7),
        "ended": "text",
        "load_seconds": 1.0,
        "first_seconds": 0.5,
        "decode_seconds": 2.0,
        "bytes_before": 1,
        "resident_bytes": 2,
        "peak_bytes": 3,
        "weights_bytes": 8,
        "gpu_peak_bytes": None,
    }
    return Generated(text=text, new_ids=new_ids, **given | fields)


def agreement(ours: Generated, theirs: Generated | None) -> Agreement | None:
    return Generation(options=GenerateOptions(), prompt="p", model=ours, against=theirs).agreement


def test_rates_are_of_the_prompt_and_of_the_tokens_after_the_first() -> None:
    found = generated("a b c d e", 1, 2, 3, 4, 9)
    assert (found.prompt_rate, found.decode_rate) == (6.0, 2.0)


def test_a_single_token_has_no_rate() -> None:
    assert generated("a", 1, decode_seconds=0.0).decode_rate is None


def test_texts_of_the_same_tokens_agree() -> None:
    ours, theirs = generated("the sea", 1, 2), generated("the sea", 1, 2)
    assert agreement(ours, theirs) == Agreement(2, same=True)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (
            generated("the sky is blue and wide", 1, 2, 3, 4, 5, 6),
            generated("the sky is black", 1, 2, 3, 7),
            Agreement(3, False, "blue and wide", "black"),
        ),
        # one that goes on where the other has ended
        (
            generated("the sky", 1, 2),
            generated("the sky is", 1, 2, 3),
            Agreement(2, False, "", "is"),
        ),
        (generated("yes", 1), generated("no", 2), Agreement(0, False, "yes", "no")),
    ],
    ids=["in a word", "one ends", "at once"],
)
def test_texts_part_where_their_tokens_do_and_go_on_with_whole_words(
    ours: Generated, theirs: Generated, expected: Agreement
) -> None:
    assert agreement(ours, theirs) == expected


def test_there_is_nothing_to_compare_with_other_tokens_or_alone() -> None:
    ours = generated("a", 1)
    assert agreement(ours, None) is None
    assert agreement(ours, generated("a", 1, prompt_ids=(5, 6))) is None


def test_json_counts_tokens_and_has_rates() -> None:
    found = Generation(
        options=GenerateOptions(), prompt="p", model=generated("a b", 1, 2), against=None
    )
    content = json.loads(json.dumps(found.to_dict()))
    ours = content["model"]
    assert (ours["prompt_tokens"], ours["new_tokens"]) == (3, 2)
    assert (ours["prompt_tokens_per_second"], ours["decode_tokens_per_second"]) == (6.0, 0.5)
    assert (content["against"], content["agreement"]) == (None, None)
