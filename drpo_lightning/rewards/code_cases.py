"""The tests of a program, as data sets write them, and the program in a completion."""

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FENCED = re.compile(r"^[ \t]*```[ \t]*(\w*+)[^\n]*+\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
LANGUAGES = {"python", "python3", "py"}


@dataclass(frozen=True)
class CodeCase:
    """One test of a program.

    Args:
        input: what the program reads from its standard input.
        output: what it must write to its standard output; None if that does not matter.
        test: Python that runs after the program, in its names, and must come to its end.
    """

    input: str = ""
    output: str | None = None
    test: str = ""


def python_block(completion: str) -> str | None:
    """The last fenced block of Python in a completion, or the last without a language; None if none is closed."""
    blocks = FENCED.findall(completion)
    labelled = [code for language, code in blocks if language.lower() in LANGUAGES]
    programs = labelled or [code for language, code in blocks if not language]
    return textwrap.dedent(programs[-1]) if programs else None


def code_cases(tests: Any) -> list[CodeCase]:  # noqa: ANN401
    """The tests of a row.

    Args:
        tests: Python as a text, or a list of such texts, each a test of its own (MBPP); a list of `{input, output}`;
            `{inputs, outputs}` or `{input, output}` with two lists (APPS, TACO, CodeContests); or JSON of any of these.

    Raises:
        ValueError: if it is none of these, or holds no test.
    """
    tests = _decoded(tests)
    cases = _paired(tests) if isinstance(tests, Mapping) else [_case(test) for test in _listed(tests)]
    if not cases:
        raise ValueError("the tests of a program are empty")
    return cases


def _decoded(tests: Any) -> Any:  # noqa: ANN401
    """JSON as what it says; Python as it is."""
    if isinstance(tests, str) and tests.lstrip().startswith(("[", "{")):
        try:
            return json.loads(tests)
        except ValueError:
            return tests
    return tests


def _listed(tests: Any) -> Sequence[Any]:  # noqa: ANN401
    return tests if isinstance(tests, Sequence) and not isinstance(tests, str) else [tests]


def _paired(tests: Mapping[str, Any]) -> list[CodeCase]:
    """The cases of two lists of the same length, or of the two texts of one case."""
    for names in (("inputs", "outputs"), ("input", "output")):
        given, expected = (tests.get(name) for name in names)
        if isinstance(given, list) and isinstance(expected, list) and len(given) == len(expected):
            return [_case({"input": one, "output": other}) for one, other in zip(given, expected, strict=True)]
    return [_case(tests)]


def _case(test: Any) -> CodeCase:  # noqa: ANN401
    if isinstance(test, str) and test.strip():
        return CodeCase(test=test)
    if isinstance(test, Mapping) and isinstance(test.get("input"), str) and isinstance(test.get("output"), str):
        return CodeCase(input=test["input"], output=test["output"])
    raise ValueError(f"a test must be Python as a text, or have an `input` and an `output` as texts, got {test!r}")
