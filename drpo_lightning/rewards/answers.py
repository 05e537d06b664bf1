"""Comparisons of a completion with the answer that the data set gives."""

import re
from fractions import Fraction

# A hyphen after a digit or a letter is no sign: 10-20 is a range, or a difference.
NUMBER = r"(?:(?<!\w)-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
RATIONAL = re.compile(rf"(?<!/){NUMBER}/\d+(?![\d/]|\.\d)|{NUMBER}")
"""A number, or a fraction of which the denominator is a whole number; 3/4/2024 is none."""
DIGITS = r"\d{1,18}"
LATEX_FRACTION = re.compile(
    rf"(?:(?<![\d.,])({DIGITS})\s*)?\\[dt]?frac\s*(?:\{{\s*(-?{DIGITS})\s*\}}\s*\{{\s*({DIGITS})\s*\}}|(\d)\s*(\d))"
)
MINUS_SIGN = "\N{MINUS SIGN}"
BOX = re.compile(r"\\boxed\s*\{")
UNIT = re.compile(r"(?<=[\d}])\s*(?:\\?%|°|\^\\circ|\^\{\\circ\}|\\(?:text|textrm|mathrm)\{[^{}\d]*\})$")


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


def boxed_number(text: str) -> Fraction | None:
    r"""The number in the last `\boxed{...}` of a text; None if there is none, or anything but a number in it.

    Dollar signs before it, a unit in `\\text{...}`, a percent or degree sign after it, and `x =` are passed over.
    """
    box = (last_boxed(text) or "").replace("{,}", ",")
    for decoration in ("\\$", "$", r"\!", r"\,", r"\ "):
        box = box.replace(decoration, "")
    box = re.sub(r"^\s*\\text\{([^{}]*)\}\s*$", r"\1", UNIT.sub("", box.strip()))
    box = re.sub(r"^\s*[A-Za-z]\s*=", "", box)  # x = 42
    number = _plain(box).strip()
    return _value(number) if RATIONAL.fullmatch(number) else None


def numeric_answer(completion: str, answer: str, *, boxed: bool = False) -> float:
    r"""1.0 if the last number of the completion equals the last number of the answer, else 0.0.

    Compared exactly: `1,024.50` equals `1024.5` and `1/2` equals `0.5`; `0.33` is not `1/3`, and `50%` is 50.

    Args:
        completion: what the policy wrote.
        answer: what the data set says.
        boxed: the completion's last `\boxed{...}` must hold the number and nothing else, see `boxed_number`.

    Raises:
        ValueError: if the answer holds no number.
    """
    expected = last_number(str(answer))
    if expected is None:
        raise ValueError(f"`answer` must hold a number, got {answer!r}")
    given = boxed_number(completion) if boxed else last_number(completion)
    return float(given == expected)


def _plain(text: str) -> str:
    r"""Typographic minus signs as hyphens, `\frac{1}{2}` as `1/2`, and the mixed `3\frac{1}{2}` as `7/2`."""

    def fraction(match: re.Match[str]) -> str:
        numerator, denominator = int(match[2] or match[4]), int(match[3] or match[5])
        space = "" if match.string[: match.start()].endswith("-") else " "
        return f"{space}{int(match[1] or 0) * denominator + numerator}/{denominator}"

    return LATEX_FRACTION.sub(fraction, text.replace(MINUS_SIGN, "-"))


def _value(number: str) -> Fraction | None:
    """A number as it is worth; None for a division by 0, or more digits than Python converts."""
    numerator, _, denominator = number.replace(",", "").partition("/")
    try:
        return Fraction(numerator) / int(denominator or 1)
    except (ZeroDivisionError, ValueError):
        return None
