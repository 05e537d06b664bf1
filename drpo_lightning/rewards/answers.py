"""Comparisons of a completion with the answer that the data set gives."""

import re
from fractions import Fraction

UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
# A hyphen after a digit or a letter is no sign: 10-20 is a range, or a difference.
NUMBER = rf"(?:(?<!\w)-)?{UNSIGNED}"
RATIONAL = re.compile(rf"(?<!/){NUMBER}/\d+(?![\d/]|\.\d)|{NUMBER}", re.ASCII)
"""A number, or a fraction of which the denominator is a whole number; 3/4/2024 is none."""
SOLE_NUMBER = re.compile(rf"[+-]?\s*{UNSIGNED}(?:\s*/\s*\d+)?", re.ASCII)
DIGITS = r"\d{1,18}"
LATEX_FRACTION = re.compile(
    rf"(?:(?<![\d.,])({DIGITS})\s*)?\\[dt]?frac\s*(?:\{{\s*(-?{DIGITS})\s*\}}\s*\{{\s*({DIGITS})\s*\}}|(\d)\s*(\d))",
    re.ASCII,
)
MINUS_SIGN = "\N{MINUS SIGN}"
SIGNED_DOLLAR = re.compile(r"(?<!\$)-\\?\$(?=[\d.])", re.ASCII)
MARK = "####"
"""What stands before the answer in a solution of GSM8K."""
BOX = re.compile(r"\\boxed\s*\{")
UNIT = re.compile(r"(?<=[\d}])\s*(?:\\?%|°|\^\\circ|\^\{\\circ\}|\\(?:text|textrm|mathrm)\{[^{}\d]*\})$", re.ASCII)
DECORATIONS = ("\\$", "$", r"\!", r"\,", r"\ ", r"\left", r"\right")
# A comma in parentheses may part the coordinates of a point.
WRAPPED = re.compile(r"\A(?:(?:\\(?:text|textbf|mathrm|mathbf|boldsymbol|bm)\s*)?\{(.*)\}|\(([^,]*)\))\Z", re.DOTALL)
MAX_WRAPPINGS = 3
"""So many around each other are passed over."""


def exact_match(completion: str, answer: str) -> float:
    """1.0 if completion and answer are the same text apart from surrounding white space, else 0.0."""
    return float(completion.strip() == str(answer).strip())


def last_number(text: str) -> Fraction | None:
    r"""The last number of a text, thousands separators removed; None if there is none.

    `1/2` and `\\frac{1}{2}` are one number.
    """
    numbers = RATIONAL.findall(_plain(text))
    return _value(numbers[-1]) if numbers else None


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` of a text, nested braces included; None if there is none."""
    begin = max((box.end() for box in BOX.finditer(text)), default=0)
    depth = 1
    for i in range(begin, len(text) if begin else 0):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin:i]
    return None


def sole_number(text: str) -> Fraction | None:
    r"""The number that a text consists of; None if it is anything but one number.

    Passed over are a sign, dollar signs, braces, parentheses and bold type around it, a dot, a percent or degree sign
    or a unit in `\text{...}` behind it, and `x =` before it.
    """
    text = text.replace("{,}", ",")
    for decoration in DECORATIONS:
        text = text.replace(decoration, "")
    text = re.sub(r"^[A-Za-z]\s*=", "", UNIT.sub("", text.strip())).strip()
    for _ in range(MAX_WRAPPINGS):
        text = WRAPPED.sub(r"\1\2", text).strip()
    number = _plain(text).strip().removesuffix(".")
    return _value(number) if SOLE_NUMBER.fullmatch(number) else None


def boxed_number(text: str) -> Fraction | None:
    r"""The number in the last `\boxed{...}` of a text, see `sole_number`; None if there is no box."""
    return sole_number(last_boxed(text) or "")


def stated_answer(answer: str) -> str:
    r"""What a data set's answer says: what stands after `####`, in the last `\boxed{...}`, or else the whole text."""
    text = answer.rpartition(MARK)[2].strip()
    box = last_boxed(text)
    return text if box is None else box


def expected_number(answer: str) -> Fraction:
    r"""The number that is a data set's answer.

    Raises:
        ValueError: if what stands after `####`, in the last `\boxed{...}`, or else in the whole text, is not a number
            and nothing else, see `sole_number`.
    """
    number = sole_number(stated_answer(answer))
    if number is None:
        raise ValueError(f"`answer` must be one number, got {answer!r}; MathVerifyReward compares other answers")
    return number


def numeric_answer(completion: str, answer: str, *, boxed: bool = False) -> float:
    r"""1.0 if the last number of the completion equals the answer, else 0.0.

    Compared exactly: `1,024.50` equals `1024.5` and `1/2` equals `0.5`; `0.33` is not `1/3`, and `50%` is 50.

    Args:
        completion: what the policy wrote.
        answer: what the data set says, see `expected_number`.
        boxed: the completion's last `\boxed{...}` must hold the number and nothing else, see `sole_number`.

    Raises:
        ValueError: if the answer is not one number.
    """
    given = boxed_number(completion) if boxed else last_number(completion)
    return float(given == expected_number(str(answer)))


def _plain(text: str) -> str:
    r"""Typographic minus signs as hyphens, `-$5` as `-5`, `\frac{1}{2}` as `1/2`, the mixed `3\frac{1}{2}` as `7/2`."""

    def fraction(match: re.Match[str]) -> str:
        numerator, denominator = int(match[2] or match[4]), int(match[3] or match[5])
        space = "" if match.string[: match.start()].endswith("-") else " "
        return f"{space}{int(match[1] or 0) * denominator + numerator}/{denominator}"

    return LATEX_FRACTION.sub(fraction, SIGNED_DOLLAR.sub("-", text.replace(MINUS_SIGN, "-")))


def _value(number: str) -> Fraction | None:
    """A number as it is worth; None for a division by 0, or more digits than Python converts."""
    numerator, _, denominator = re.sub(r"[,\s]", "", number).partition("/")
    try:
        return Fraction(numerator) / int(denominator or 1)
    except (ZeroDivisionError, ValueError):
        return None
