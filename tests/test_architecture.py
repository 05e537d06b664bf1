"""The house: a file imports only from lower floors, and what is light stays light."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = "drpo_lightning"
ROOT = Path(__file__).parents[1] / PACKAGE
FLOORS = {
    "functional": 0,
    "batch": 0,
    "addresses": 0,
    "changes": 0,
    "console": 0,
    "hints": 0,
    "noise": 0,
    "packages": 0,
    "ranks": 0,
    "errors": 0,
    "disk": 0,
    "folder_lock": 0,
    "objectives": 1,
    "metrics": 1,
    "rollout": 1,
    "rewards": 1,
    "hub": 1,
    "logs": 1,
    "charts": 1,
    "checkpoints": 1,
    "log_position": 1,
    "modules": 2,
    "datamodules": 2,
    "callbacks": 3,
    "export": 3,
    "doctor": 3,
    "init": 3,
    "model_card": 3,
    "report": 3,
    "output_folders": 3,
    "resume": 3,
    "serve": 3,
    "saved_config": 1,
    "cli": 4,
    "completion": 4,
    "score": 4,
    "__main__": 4,
}
SAME_FLOOR = {
    ("callbacks", "export"),
    ("callbacks", "model_card"),
    ("export", "model_card"),
    ("resume", "callbacks"),
    ("resume", "output_folders"),
    ("output_folders", "callbacks"),
    ("disk", "errors"),
    ("addresses", "errors"),
    ("__main__", "cli"),
    ("completion", "__main__"),
    ("__main__", "score"),
    ("score", "cli"),
}
STDLIB_OF_PURE_CODE = {"abc", "collections", "dataclasses", "math", "types", "typing"}
PURE = {
    "functional": STDLIB_OF_PURE_CODE | {"torch", "jaxtyping", "drpo_lightning.functional"},
    "objectives": STDLIB_OF_PURE_CODE
    | {"torch", "jaxtyping", "drpo_lightning.functional", "drpo_lightning.objectives"},
}
IMPORTED_WHERE_USED = {"vllm", "transformers", "datasets", "pyarrow", "matplotlib", "reasoning_gym"}
RUN_MAIN = f"runpy.run_module('{PACKAGE}', run_name='__main__')"
FILES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}


def part_of(file):
    """The subpackage, or the module at the top, that a file belongs to."""
    return FILES[file].relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree):
    """Full dotted names of all imports under a node."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides the floor it goes to"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_at_import_time(tree):
    """Full dotted names of the imports outside functions; those for type checkers alone do not run."""
    names, nodes = set(), [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= imported(node)
        nodes += ast.iter_child_nodes(node)
    return names


def modules_after(code):
    """Of torch and what is heavier still, what a fresh interpreter holds after running some code."""
    report = "\nimport sys; print([m for m in ('torch', 'lightning', 'transformers', 'vllm') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return result.stdout.splitlines()[-1]


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_from_lower_floors(file):
    part = part_of(file)
    if part == "__init__":
        assert not imported(ast.parse(FILES[file].read_text()))
        return
    assert part in FLOORS, f"{part} has no floor: give it one here"
    for name in imported(ast.parse(FILES[file].read_text())):
        package, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if package != PACKAGE or target in (part, "__version__") or (part, target) in SAME_FLOOR:
            continue
        assert FLOORS[target] < FLOORS[part], f"{file} imports {name}"


@pytest.mark.parametrize("file", [file for file in FILES if part_of(file) in PURE])
def test_functional_and_objectives_import_torch_and_jaxtyping_only(file):
    allowed = PURE[part_of(file)]
    for name in imported(ast.parse(FILES[file].read_text())):
        assert any(name == root or name.startswith(f"{root}.") for root in allowed), f"{file} imports {name}"


@pytest.mark.parametrize("file", FILES)
def test_heavy_packages_are_imported_inside_functions(file):
    names = {name.split(".")[0] for name in imported_at_import_time(ast.parse(FILES[file].read_text()))}
    assert not names & IMPORTED_WHERE_USED


def test_every_floor_is_still_there():
    assert FLOORS.keys() == {part_of(file) for file in FILES} - {"__init__"}


def test_the_package_imports_nothing_heavy():
    assert modules_after("import drpo_lightning") == "[]"


@pytest.mark.parametrize("option", ["--help", "-h", "--version"])
def test_the_command_answers_about_itself_without_torch(option):
    assert modules_after(f"import runpy, sys\nsys.argv = ['drpo', '{option}']\n{RUN_MAIN}") == "[]"


def test_the_help_comes_within_two_seconds():
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", PACKAGE, "--help"], capture_output=True, check=True)
    assert time.monotonic() - started < 2


def test_an_unknown_command_exits_with_2_and_the_usage():
    result = subprocess.run([sys.executable, "-m", PACKAGE, "trian"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "no command 'trian'" in result.stderr
    assert "usage: drpo COMMAND" in result.stderr
    assert not result.stdout


def test_no_command_prints_the_usage():
    result = subprocess.run([sys.executable, "-m", PACKAGE], capture_output=True, text=True, check=True)
    assert "usage: drpo COMMAND" in result.stdout
