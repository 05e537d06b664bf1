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


def boxed_number(text: str) -> Decimal | None:
    r"""The number in the last `\boxed{...}` of a text; None if there is none, or anything but a number in it."""
    box = (last_boxed(text) or "").replace(MINUS_SIGN, "-")
    for decoration in ("$", r"\!", r"\,", r"\ ", "{,}"):
        box = box.replace(decoration, "," if decoration == "{,}" else "")
    box = re.sub(r"\\text\{([^{}]*)\}", r"\1", box)
    box = re.sub(r"^\s*[A-Za-z]\s*=", "", box).strip()  # x = 42
    return Decimal(box.replace(",", "")) if NUMBER.fullmatch(box) else None


def numeric_answer(completion: str, answer: str, *, boxed: bool = False) -> float:
    r"""1.0 if the last number of the completion equals the last number of the answer, else 0.0.

    Compared as decimal numbers: `1,024.50` equals `1024.5`.

    Args:
        completion: what the policy wrote.
        answer: what the data set says.
        boxed: the completion's last `\boxed{...}` must hold the number and nothing else.

    Raises:
        ValueError: if the answer holds no number.
    """
    expected = last_number(str(answer))
    if expected is None:
        raise ValueError(f"`answer` must hold a number, got {answer!r}")
    given = boxed_number(completion) if boxed else last_number(completion)
    return float(given == expected)
