"""Comparisons of a completion with the answer that the data set gives."""

import re
from decimal import Decimal, InvalidOperation

# A hyphen after a digit or a letter is no sign: 10-20 is a range, or a difference.
NUMBER = re.compile(r"(?:(?<!\w)-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
MINUS_SIGN = "\N{MINUS SIGN}"


def exact_match(completion: str, answer: str) -> float:
    """1.0 if completion and answer are the same text apart from surrounding white space, else 0.0."""
    return float(completion.strip() == str(answer).strip())


def last_number(text: str) -> Decimal | None:
    """The last number of a text, thousands separators removed; None if there is none."""
    numbers = NUMBER.findall(text.replace(MINUS_SIGN, "-"))
    if not numbers:
        return None
    try:
        return Decimal(numbers[-1].replace(",", ""))
    except InvalidOperation:
        return None


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` of a text, nested braces included; None if there is none."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len(r"\boxed{")
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin:i]
    return None


def numeric_answer(completion: str, answer: str, *, boxed: bool = False) -> float:
    r"""1.0 if the last number of the completion equals the last number of the answer, else 0.0.

    Compared as decimal numbers: `1,024.50` equals `1024.5`.

    Args:
        completion: what the policy wrote.
        answer: what the data set says.
        boxed: looks for the number only in the completion's last `\boxed{...}`.

    Raises:
        ValueError: if the answer holds no number.
    """
    expected = last_number(str(answer))
    if expected is None:
        raise ValueError(f"`answer` must hold a number, got {answer!r}")
    given = last_boxed(completion) or "" if boxed else completion
    return float(last_number(given) == expected)
