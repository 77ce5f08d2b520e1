"""How many structures stay, and which."""

import pytest

from emp_llm import OptionError, ShrinkOptions
from emp_llm.shrink_options import Amount, parse_amount
from emp_llm.shrinking.amounts import best, number_to_keep
from emp_llm.shrinking.choice import Structures

TEN = Structures(kind="experts", number=10, holders=("h.0",), least=2, why_least="top_k 2",
                 field="num_experts")  # fmt: skip
GROUPED = Structures(kind="experts", number=8, holders=("h.0",), least=4, groups=2,
                     why_least="n_group 2")  # fmt: skip


@pytest.mark.parametrize(
    ("given", "stay"),
    [(6, 6), ("6", 6), ("30%", 7), ("25%", 8), ("12.5%", 9), ("80%", 2), (" 50% ", 5)],
)
def test_a_number_stays_and_a_share_is_removed(given: int | str, stay: int) -> None:
    assert number_to_keep(TEN, parse_amount("experts", given)) == stay


def test_as_many_of_each_group_stay() -> None:
    assert number_to_keep(GROUPED, Amount(remove=0.4)) == 6
    choice = best(GROUPED, 6, {"h.0": [9, 1, 2, 3, 8, 7, 6, 5]}, score="aimer", prefers="low")
    assert choice.kept == {"h.0": (1, 2, 3, 5, 6, 7)}


@pytest.mark.parametrize(
    ("structures", "given", "said"),
    [
        (TEN, 10, "10 of them are to stay, but the model has 10 experts"),
        (TEN, 11, r"\(num_experts\): give a smaller number"),
        (TEN, 1, "too few for top_k 2: keep at least 2"),
        (TEN, "90%", "too few for top_k 2"),
        (TEN, "9%", "less than one"),
        (GROUPED, 5, r"cannot be divided into 2 groups of equal size \(n_group 2\)"),
        (GROUPED, "20%", "less than one of each of 2 groups"),
        (GROUPED, 2, "too few for n_group 2: keep at least 4"),
    ],
)
def test_what_cannot_be_is_refused_with_the_field(
    structures: Structures, given: int | str, said: str
) -> None:
    with pytest.raises(OptionError, match=said):
        number_to_keep(structures, parse_amount("experts", given))


@pytest.mark.parametrize(
    "given", [0, -1, True, "0%", "100%", "1.5", "6 experts", "", "nan%", "1e1"]
)
def test_what_is_no_amount_is_refused_when_the_options_are_made(given: int | str) -> None:
    ways = "give how many stay, such as 6, the share that is removed, such as '25%' or 'auto'$"
    with pytest.raises(OptionError, match=ways):
        ShrinkOptions(experts=given)


def test_the_best_are_the_lowest_or_the_highest_and_of_equal_ones_the_first() -> None:
    structures = Structures(kind="experts", number=4, holders=("a", "b"))
    scores = {"a": [3.0, 1.0, 2.0, 1.0], "b": [1.0, 1.0, 1.0, 1.0]}
    low = best(structures, 2, scores, score="aimer", prefers="low")
    high = best(structures, 2, scores, score="aimer", prefers="high")
    assert low.kept == {"a": (1, 3), "b": (0, 1)}
    assert high.kept == {"a": (0, 2), "b": (0, 1)}
    assert low.scores == {"a": (3.0, 1.0, 2.0, 1.0), "b": (1.0, 1.0, 1.0, 1.0)}
