"""Quantities: what is shown reads back, prefixes scale, and a wrong unit is refused in one line that says what is allowed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import UserError
from thinwire.units import parse, show

UNITS = ["bit/s", "s", "B", "flop/s", ""]
magnitudes = st.floats(1e-8, 1e14)


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("100 Mbit/s", "bit/s", 1e8),
        ("100Mbit/s", "bit/s", 1e8),
        ("450 GB/s", "bit/s", 3.6e12),
        ("50 us", "s", 50e-6),
        ("50 µs", "s", 50e-6),
        ("2 min", "s", 120.0),
        ("4 GiB", "B", 4 * 2**30),
        ("4 GB", "B", 4e9),
        ("6 Gflop/s", "flop/s", 6e9),
        ("1e3 kbit/s", "bit/s", 1e6),
        ("1_000", "B", 1000.0),
        ("50 %", "", 0.5),
        (" 7 ", "s", 7.0),
        (7, "s", 7.0),
    ],
)
def test_quantities_as_people_write_them(text, unit, value) -> None:
    assert parse(text, unit) == pytest.approx(value, rel=1e-12)


@given(magnitudes, st.sampled_from(UNITS))
def test_what_is_shown_reads_back_within_its_three_digits(value, unit) -> None:
    assert parse(show(value, unit), unit) == pytest.approx(value, rel=0.006)


@given(magnitudes, st.sampled_from(UNITS))
def test_a_number_without_a_unit_is_in_the_base_unit(value, unit) -> None:
    assert parse(value, unit) == parse(repr(value), unit) == value


@given(st.floats(1, 999), st.sampled_from(["bit/s", "B", "flop/s"]))
def test_each_decimal_prefix_is_a_thousand_times_the_one_before(value, unit) -> None:
    scaled = [parse(f"{value!r} {prefix}{unit}", unit) for prefix in ("", "k", "M", "G", "T", "P")]
    assert scaled == pytest.approx([value * 1000.0**k for k in range(6)])


@given(st.floats(1, 1e6), st.sampled_from(["", "k", "M", "G"]))
def test_a_byte_is_eight_bits(value, prefix) -> None:
    assert parse(f"{value!r} {prefix}B/s", "bit/s") == pytest.approx(8 * parse(f"{value!r} {prefix}bit/s", "bit/s"))


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (1e8, "bit/s", "100 Mbit/s"),
        (0.00125, "s", "1.25 ms"),
        (3.25 * 2**20, "B", "3.25 MiB"),
        (0, "s", "0 ns"),
        (999.96e6, "bit/s", "1 Gbit/s"),
        (300, "s", "5.0 min"),
        (0.5, "", "0.5"),
    ],
)
def test_numbers_are_shown_for_people(value, unit, shown) -> None:
    assert show(value, unit) == shown


@pytest.mark.parametrize(
    ("value", "unit", "message"),
    [
        ("100 Mbit", "bit/s", "'100 Mbit' has a wrong unit; allowed: bit/s kbit/s .*'100 Mbit/s'"),
        ("5 MiB", "s", "'5 MiB' has a wrong unit; allowed: s, ms, us, .*'50 us'"),
        ("5 mb", "B", "'5 mb' has a wrong unit; allowed: .*KiB"),
        ("fast", "bit/s", "'fast' is not a number with a unit; e.g. '100 Mbit/s'"),
        ("", "B", "'' is not a number with a unit"),
        (True, "B", "True is not a quantity"),
        ([1], "B", r"\[1\] is not a quantity"),
        (float("nan"), "s", "nan is not a quantity; it must be finite"),
        (float("inf"), "bit/s", "inf is not a quantity; it must be finite"),
        ("1e999 s", "s", "'1e999 s' is not a quantity; it must be finite"),
    ],
)
def test_what_is_no_quantity_is_refused_in_one_line(value, unit, message) -> None:
    with pytest.raises(UserError, match=f"^{message}") as error:
        parse(value, unit)
    assert "\n" not in str(error.value)
