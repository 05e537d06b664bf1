"""Programs in completions, and tests as data sets write them."""

import json

import pytest

from drpo_lightning.rewards.code_cases import CodeCase, code_cases, python_block

PAIRS = [CodeCase(input="1 2", output="3"), CodeCase(input="4 5", output="9")]
ASSERTS = ["assert f(1) == 2", "assert f(2) == 3"]


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("So:\n\n```py\nx = 1\n\ny = 2\n```\nDone.", "x = 1\n\ny = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```Python3 title=a.py\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nor\n```python\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1\n```\nprints\n```text\n1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nExample output:\n```\n3\n```", "x = 1\n"),
        ("Like this:\n```\n3\n```\n```py\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```\nor\n```\nx = 2\n```", "x = 2\n"),
        ("1. this\n   ```python\n   if x:\n       y()\n   ```", "if x:\n    y()\n"),
        ("```python\nprint('```')\n```", "print('```')\n"),
        ("```python\n```", ""),
        ("```python\nx = 1", None),
        ("x = 1", None),
        ("```bash\nls\n```", None),
        ("`x = 1`", None),
        ("", None),
    ],
)
def test_the_program_is_the_last_closed_block_of_python(completion, program):
    assert python_block(completion) == program


@pytest.mark.parametrize(
    ("tests", "cases"),
    [
        (ASSERTS, [CodeCase(test=test) for test in ASSERTS]),
        (ASSERTS[0], [CodeCase(test=ASSERTS[0])]),
        ("def check(f):\n    assert f(1)\ncheck(g)", [CodeCase(test="def check(f):\n    assert f(1)\ncheck(g)")]),
        ([{"input": "1 2", "output": "3"}, {"input": "4 5", "output": "9"}], PAIRS),
        ({"inputs": ["1 2", "4 5"], "outputs": ["3", "9"]}, PAIRS),
        ({"input": ["1 2", "4 5"], "output": ["3", "9"], "time": None}, PAIRS),
        ({"input": "1 2", "output": "3"}, PAIRS[:1]),
        ("[x for x in f(3)]", [CodeCase(test="[x for x in f(3)]")]),
    ],
)
def test_tests_are_read_as_data_sets_write_them(tests, cases):
    assert code_cases(tests) == cases
    assert code_cases(json.dumps(tests) if not isinstance(tests, str) else tests) == cases


@pytest.mark.parametrize(
    "tests",
    [
        None, 5, "", [], {}, [None], [5], [""], [{"input": "1"}], [{"input": 1, "output": 2}], "[]",
        {"inputs": ["1", "2"], "outputs": ["1"]}, {"inputs": [], "outputs": []}, {"inputs": [1], "outputs": [2]},
        {"fn_name": "f", "inputs": [[1]], "outputs": [2]},
    ],
)  # fmt: skip
def test_anything_else_is_an_error(tests):
    with pytest.raises(ValueError, match="test"):
        code_cases(tests)
