"""Answers compared as mathematics, by worked examples."""

import pytest

from drpo_lightning.rewards import RewardBatch

math_answer = pytest.importorskip("drpo_lightning.rewards.math_answer", exc_type=ImportError)


def score(completion, answer, boxed=True):
    batch = RewardBatch(["p"], [completion], [[1]], ["stop"], {"answer": [answer]})
    return math_answer.MathAnswer("answer", boxed, "math", 1.0).score(batch)[0]


@pytest.mark.parametrize(
    ("box", "answer"),
    [
        ("42", "42"),
        ("42", 42),
        ("0.5", r"\frac{1}{2}"),
        (r"\frac12", "1/2"),
        (r"\frac12", r"$\frac{1}{2}$"),
        (r"\frac12", r"so \boxed{\frac{1}{2}}"),
        ("1024", "1,024"),
        ("1{,}024", "1024"),
        (r"5\text{ cm}", "5"),
        (r"\$5", "5"),
        ("18.5", r"\$18.50"),
        ("18", r"\$18"),
        ("18", "$18"),
        ("18", "18 $"),
        ("18", r"$\$18$"),
        ("18", r"$$18$$"),
        ("18", "6 a piece.\n#### $18"),
        ("x^2", r"at \$5 it is $x^2$"),
        (r"50\%", r"50\%"),
        (r"50\%", "0.5"),
        (r"90^\circ", "90"),
        ("x = 5", "5"),
        ("5", "x = 5"),
        ("-3", "-3"),
        (r"\sqrt{12}", r"2\sqrt{3}"),
        ("(x+1)^2", "x^2 + 2x + 1"),
        ("(1, 2)", "(1,2)"),
        ("2, 1", r"\{1, 2\}"),
        (r"\text{(A)}", "A"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        ("18", "He has 3 x 6 apples.\n#### 18"),
        ("1800", "#### 1,800"),
    ],
)
def test_equal_answers_are_equal_however_they_are_written(box, answer):
    assert score(rf"So it is \boxed{{{box}}}.", answer) == 1.0


@pytest.mark.parametrize(
    ("box", "answer"),
    [
        ("43", "42"),
        ("-3", "3"),
        ("0.33", r"\frac{1}{3}"),
        ("10^{20}+1", "10^{20}"),
        ("(2, 1)", "(1, 2)"),
        ("5, 6", "5"),
        (r"5 \text{ or } 6", "5"),
        ("1, 2, 3, 4, 5", "5"),
        ("x^2 + 2x", "x^2 + 2x + 1"),
        ("x + 1", "y + 1"),
        ("", "42"),
        (r"\frac{", "42"),
        (r"\frac{1}{0}", "42"),
    ],
)
def test_different_answers_are_not(box, answer):
    assert score(rf"So it is \boxed{{{box}}}.", answer) == 0.0


def test_the_last_box_alone_counts():
    assert score(r"\boxed{5}, no, \boxed{6}", "6") == 1.0
    assert score(r"\boxed{6}, no, \boxed{5}", "6") == 0.0
    assert score(r"\boxed{5} \boxed{6}", "6") == 1.0  # by itself math-verify takes the two for a set
    assert score(r"\boxed{5} and 6", "6") == 0.0


@pytest.mark.parametrize("completion", ["", "42", "$42$", "the answer is 42", r"\boxed{42"])
def test_without_a_box_there_is_no_answer(completion):
    assert score(completion, "42") == 0.0


@pytest.mark.parametrize(
    ("completion", "value"), [("the answer is 42", 1.0), ("so $x = 42$.", 1.0), (r"41 \boxed{42}", 1.0), ("41", 0.0)]
)
def test_unboxed_answers_count_if_asked(completion, value):
    assert score(completion, "42", boxed=False) == value


@pytest.mark.parametrize("answer", ["", "  ", "####"])
def test_a_row_without_an_answer_is_an_error(answer):
    with pytest.raises(ValueError, match="cannot be read as mathematics"):
        score(r"\boxed{42}", answer)


@pytest.mark.parametrize("boxed", [True, False])
@pytest.mark.parametrize(
    "written",
    [
        "{0}",
        r"\text{{{0}}}",
        r"\{{\text{{{0}}}, 1\}}",
        r"(\text{{{0}}}, 1)",
        r"x = \text{{{0}}}",
        r"\operatorname{{{0}}}(1)",
        r"\frac{{\text{{{0}}}}}{{2}}",
    ],
)
def test_python_in_an_answer_is_not_run(tmp_path, boxed, written):
    code = f"__import__('pathlib').Path('{tmp_path / 'ran'}').touch()"
    for answer in ("42", r"\{1, 2\}", "(a, 1)", r"\text{a}"):
        score(rf"the answer is \boxed{{{written.format(code)}}}", answer, boxed=boxed)
        score(f"the answer is ${written.format(code)}$ or {code}", answer, boxed=boxed)
    assert not (tmp_path / "ran").exists()
