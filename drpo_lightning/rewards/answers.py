"""Comparisons of a completion with the answer that the data set gives."""

import re
from decimal import Decimal, InvalidOperation

NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")


def exact_match(completion: str, answer: str) -> float:
    """1.0 if completion and answer are the same text apart from surrounding white space, else 0.0."""
    return float(completion.strip() == str(answer).strip())


def last_number(text: str) -> Decimal | None:
    """The last number of a text, thousands separators removed; None if there is none."""
    numbers = NUMBER.findall(text)
    if not numbers:
        return None
    try:
        return Decimal(numbers[-1].replace(",", ""))
    except InvalidOperation:
        return None


def numeric_answer(completion: str, answer: str) -> float:
    """1.0 if the last number of the completion equals the last number of the answer, else 0.0.

    Compared as decimal numbers: `1,024.50` equals `1024.5`.

    Raises:
        ValueError: if the answer holds no number.
    """
    expected = last_number(str(answer))
    if expected is None:
        raise ValueError(f"`answer` must hold a number, got {answer!r}")
    return float(last_number(completion) == expected)
