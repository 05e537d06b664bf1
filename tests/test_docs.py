"""What the documentation names exists."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from drpo_lightning import objectives

ROOT = Path(__file__).parents[1]
PAPER_MAP = (ROOT / "docs" / "paper_map.md").read_text()
ROWS = [
    line
    for line in PAPER_MAP.splitlines()
    if line.startswith("|") and not line.startswith(("| statement", "| what", "|---"))
]
FUNCTIONS = sorted(set(re.findall(r"`(drpo_lightning(?:\.\w+)+)`", PAPER_MAP)))
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAPER_MAP)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_in_the_paper_map_exists(name):
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        break
    for attribute in parts[length:]:
        found = getattr(found, attribute)
    assert callable(found)


@pytest.mark.parametrize(("file", "name"), TESTS)
def test_a_test_in_the_paper_map_exists(file, name):
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_paper_map_has_four_columns_a_function_and_a_test(row):
    _, statement, _, function, test, _ = re.split(r"(?<!\\)\|", row)
    assert statement.strip()
    assert re.search(r"`drpo_lightning\.", function)
    assert re.search(r"`tests/", test)


def test_every_objective_is_in_the_paper_map():
    functions = {name for name in objectives.__all__ if name.islower()}
    named = {name.removeprefix("drpo_lightning.objectives.") for name in FUNCTIONS}
    assert functions | {"Decoupled"} <= named
