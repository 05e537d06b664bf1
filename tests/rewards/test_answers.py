"""Answers compared with what the data set says, by worked examples."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drpo_lightning.rewards import exact_match, numeric_answer
from drpo_lightning.rewards.answers import expected_number, last_boxed, last_number


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("42", "42", 1.0),
        (" 42\n", "42", 1.0),
        ("42", "\t42 ", 1.0),
        ("42", 42, 1.0),
        ("42.0", "42", 0.0),
        ("4 2", "42", 0.0),
        ("Paris", "paris", 0.0),
        ("", "42", 0.0),
        ("42 42", "42", 0.0),
        ("", "", 1.0),
    ],
)
def test_exact_match_ignores_surrounding_white_space_only(completion, answer, score):
    assert exact_match(completion, answer) == score


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", "42"),
        ("the answer is 42.", "42"),
        ("1, 2 and 3", "3"),
        ("3.", "3"),
        ("3.50", "3.5"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("-7", "-7"),
        ("x=-7.25!", "-7.25"),
        ("1,024", "1024"),
        ("$1,234,567.89 in all", "1234567.89"),
        ("12,34", "34"),  # no thousands separator
        ("1, 000", "0"),
        ("(1,2)", "2"),
        ("007", "7"),
        ("50%", "50"),
        ("1/2", "1/2"),
        ("-3/4 of it", "-3/4"),
        ("so 100/5 = 20", "20"),
        ("on 3/4/2024", "2024"),
        ("7/2.5", "2.5"),
        (r"\frac{3}{2}", "3/2"),
        (r"x = -\dfrac{1}{2}$", "-1/2"),
        (r"\frac{-1}{2}", "-1/2"),
        (r"\tfrac34", "3/4"),
        (r"3\frac{1}{2}", "7/2"),
        (r"-3\frac12", "-7/2"),
        (r"\frac{1}{2}\frac{3}{4}", "3/4"),
        ("3 apples cost 4€ each, so 12€", "12"),
        ("version 1.2.3", "0.3"),
        ("it lost -$5", "-5"),
        (r"it lost -\$5", "-5"),
        ("between 3-$5", "5"),
        ("between $3$-$5$", "5"),
        ("3 \u0663", "3"),
        ("9" * 60, "9" * 60),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == Fraction(number)


@pytest.mark.parametrize("text", ["", "none", "-", ".", "six", ",,,", "-.", "\\boxed{}", "1/0", "9" * 5000])
def test_a_text_without_a_number_has_none(text):
    assert last_number(text) is None


@given(st.integers(-(10**15), 10**15), st.integers(0, 6), st.text(alphabet="abc =:$\n", max_size=10))
def test_the_last_number_is_found_however_it_is_written(units, places, text):
    number = Decimal(units).scaleb(-places)
    for written in (f"{number:f}", f"{number:,f}"):
        assert last_number(f"3 {text} {written}{text}") == Fraction(number)


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{42}", "42"),
        (r"so \boxed{1} and then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a_{1_{2}}}}", "a_{1_{2}}"),
        (r"\boxed{}", ""),
        (r"\boxed{ x }", " x "),
        (r"\boxed{two" "\n" "lines}", "two\nlines"),
        (r"$\boxed{5}$ } {", "5"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{42", None),
        (r"\boxed{1}, no: \boxed{2", None),
        (r"\boxed{{42}", None),
        ("boxed{42}", None),
        (r"\boxed 42", None),
        ("", None),
    ],
)
def test_last_boxed(text, boxed):
    assert last_boxed(text) == boxed


@given(
    st.recursive(
        st.text("ab1 ", max_size=4), lambda part: st.builds("{{{0}}}".format, part) | st.builds(str.__add__, part, part)
    )
)
def test_boxed_finds_whatever_is_balanced(content):
    assert last_boxed(rf"\boxed{{no}} \boxed{{{content}}} done") == content


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("42", "42", 1.0),
        ("it is 1,024.50", "1024.5", 1.0),
        ("1024.5", "$1,024.50", 1.0),
        ("42.0000", 42, 1.0),
        ("-3", "-3.0", 1.0),
        ("-3", "3", 0.0),
        ("3", "-3", 0.0),
        ("41 or 42", "41", 0.0),
        ("41 or 42", "42", 1.0),
        ("no idea", "42", 0.0),
        ("", "0", 0.0),
        ("2 + 2 = 4. #### 4", "He has 2 + 2 = 4. #### 4", 1.0),
        ("0.1", "0.10", 1.0),
        ("0.30000000000000004", "0.3", 0.0),
        ("-0", "0", 1.0),
        ("it is 1/2", "0.5", 1.0),
        ("3/2", "1/2", 0.0),
        ("0.33", "1/3", 0.0),
        ("50%", "50", 1.0),
        ("50%", "0.5", 0.0),
    ],
)
def test_numeric_answer(completion, answer, score):
    assert numeric_answer(completion, answer) == score


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (r"\boxed{42}", 1.0),
        (r"41, so \boxed{42}. Or 43?", 1.0),
        (r"\boxed{41} or \boxed{42}", 1.0),
        (r"\boxed{42} or \boxed{41}", 0.0),
        (r"\boxed{x = 42}", 1.0),
        (r"\boxed{\text{42}}", 1.0),
        ("42", 0.0),
        (r"42 \boxed{}", 0.0),
        (r"42 \boxed{none}", 0.0),
        (r"42 \boxed{42", 0.0),
        (r"\boxed {42}", 1.0),
        (r"\boxed{\$42}", 1.0),
        (r"\boxed{42\%}", 1.0),
        (r"\boxed{42\text{ cm}}", 1.0),
        (r"\boxed{42^\circ}", 1.0),
        (r"\boxed{\frac{84}{2}}", 1.0),
        (r"\boxed{\frac{42}{5}}", 0.0),
        (r"\boxed{-42}", 0.0),
        (r"\boxed{\text{cm}}", 0.0),
        (r"\boxed{42\text{ or }43}", 0.0),
        (r"\boxed{42\text{ or 43}}", 0.0),
        (r"\boxed{+42}", 1.0),
        (r"\boxed{42.}", 1.0),
        (r"\boxed{(42)}", 1.0),
        (r"\boxed{{42}}", 1.0),
        (r"\boxed{\left(42\right)}", 1.0),
        (r"\boxed{\mathbf{42}}", 1.0),
        (r"\boxed{\textbf{(42)}}", 1.0),
        (r"\boxed{\mathbf{\frac{84}{2}}}", 1.0),
        (r"\boxed{84 / 2}", 1.0),
        (r"\boxed{(1,042)}", 0.0),
        (r"\boxed{(4)(2)}", 0.0),
        (r"\boxed{{4}{2}}", 0.0),
        (r"\boxed{+-42}", 0.0),
        ("\\boxed{\u0664\u0662}", 0.0),
    ],
)
def test_only_the_boxed_number_counts_if_asked(completion, score):
    assert numeric_answer(completion, "42", boxed=True) == score


@pytest.mark.parametrize(("answer", "box"), [(r"\frac{3}{2}", "2"), ("3/2", "2"), (r"2\frac12", r"\frac12")])
def test_a_part_of_a_fraction_is_not_the_answer(answer, box):
    assert numeric_answer(rf"\boxed{{{box}}}", answer, boxed=True) == 0.0
    assert numeric_answer(rf"\boxed{{{answer}}}", answer, boxed=True) == 1.0


@pytest.mark.parametrize("boxed", [False, True])
def test_an_answer_without_a_number_is_an_error(boxed):
    with pytest.raises(ValueError, match="`answer` must be one number, got 'unknown'; MathVerifyReward"):
        numeric_answer("42", "unknown", boxed=boxed)


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize(
    "answer",
    [
        r"2\sqrt{3}", r"\frac{\pi}{6}", "(1,2)", r"5 \text{ m}^2", "2^{10}", "11011_7", "1e3", "5 or 6", "3x",
        "#### 5x", r"5 \boxed{}", "", None,
    ],
)  # fmt: skip
def test_an_answer_that_is_not_one_number_is_an_error(answer, boxed):
    for completion in (r"\boxed{3}", r"\boxed{2}", r"\boxed{10}", "6"):
        with pytest.raises(ValueError, match="must be one number"):
            numeric_answer(completion, answer, boxed=boxed)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("He has 3 x 4 = 12.\n#### 1,234", "1234"),
        ("3 / 4", "3/4"),
        (12, "12"),
        (12.5, "12.5"),
        (r"so $\boxed{\frac{1}{2}}$.", "1/2"),
        ("#### $18", "18"),
        (r"-\$18.50", "-18.5"),
        ("- 7", "-7"),
        (r"$336^\circ$", "336"),
    ],
)
def test_an_answer_is_read_as_data_sets_write_it(answer, number):
    assert expected_number(str(answer)) == Fraction(number)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**9), max_value=10**9), st.booleans())
def test_a_number_answers_itself_and_not_another(number, boxed):
    def written(value):
        return rf"\boxed{{{value:,f}}}" if boxed else f"{value:f}"

    assert numeric_answer(written(number), f"{number:f}", boxed=boxed) == 1.0
    assert numeric_answer(written(number + Decimal("0.0001")), f"{number:f}", boxed=boxed) == 0.0


@pytest.mark.parametrize(("completion", "answer"), [("10-20", "20"), ("answer-42", "42"), ("5-3", "3")])
def test_a_hyphen_is_no_sign(completion, answer):
    assert numeric_answer(completion, answer) == 1.0


def test_the_minus_sign_of_typography_is_a_sign():
    assert numeric_answer("\u22125", "5") == 0.0
    assert numeric_answer("\u22125", "-5") == 1.0


@pytest.mark.parametrize("box", [r"\frac{3}{x}", "10^5", "x=3,y=2", "1 or 2", "2.5e2", "2 cm", ""])
def test_a_box_with_more_than_a_number_does_not_pass(box):
    for answer in ("2", "5", "3"):
        assert numeric_answer(rf"\boxed{{{box}}}", answer, boxed=True) == 0.0
