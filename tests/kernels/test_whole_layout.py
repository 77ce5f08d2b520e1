"""A layout of whole records that contradicts itself is refused."""

import pytest
from emp_kernels.numbers import BF16, F16
from emp_kernels.whole_layout import WholeLayout
from support.rows import lists_of


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"weights": 0}, "a record of 0 weights"),
        ({"dropped_bits": -1}, "dropped_bits is -1"),
        ({"dropped_bits": 8}, "dropped_bits is 8"),
        ({"widths": ()}, "0 tiers"),
        ({"widths": (1,) * 9, "exponents": lists_of(range(9))}, "9 tiers"),
        ({"widths": (1, 0)}, "each has 1 to 3"),
        ({"widths": (4,), "exponents": lists_of(range(15))}, "each has 1 to 3"),
        ({"exponents": lists_of([1, 2, 3])}, "the tiers need 4 different"),
        ({"exponents": lists_of([1, 2, 3, 1])}, "the tiers need 4 different"),
        ({"exponents": lists_of([1, 2, 3, 256])}, "an exponent has 8 bits"),
        ({"exponents": lists_of([1, 2, 3, -1])}, "an exponent has 8 bits"),
        ({"number_format": F16, "exponents": lists_of([1, 2, 3, 32])}, "an exponent has 5 bits"),
        (
            {"number_format": F16, "widths": (3, 3, 3, 3, 3), "exponents": lists_of(range(35))},
            "room for 35 exponents",
        ),
        ({"exponents": ()}, "0 lists of exponents; there are 4"),
        ({"exponents": lists_of([1, 2, 3, 4])[:3]}, "3 lists of exponents; there are 4"),
        ({"dropped_bits": 6}, "4 lists of exponents; there are 2"),
        ({"dropped_bits": 7}, "4 lists of exponents; there are 1"),
        ({"exponents": (*[(1, 2, 3, 4)] * 3, (1, 2, 3, 5))}, "not all the same exponents"),
        ({"exponents": (*[(1, 2, 3, 4)] * 3, (1, 2, 3, 3))}, "not all the same exponents"),
        ({"exponents": (*[(1, 2, 3, 4)] * 3, (1, 2, 3))}, "not all the same exponents"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(changes, fault):
    fields = {
        "number_format": BF16,
        "weights": 10,
        "widths": (1, 2),
        "exponents": lists_of([1, 2, 3, 4]),
    }
    with pytest.raises(ValueError, match=fault):
        WholeLayout(**(fields | changes))
