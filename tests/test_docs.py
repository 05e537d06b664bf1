"""The documentation: what it names exists, what it links to is there, and what it shows can be run."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from drpo_lightning import callbacks, cli, objectives
from drpo_lightning.charts import LAYOUT

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
}
TABLES = {"tokens/corrected"}
"""Named among the keys; they stand in TensorBoard's Text tab."""


class Block(NamedTuple):
    """A code block of a page."""

    page: str
    line: int
    language: str
    code: str

    def __str__(self):
        return f"{self.page}:{self.line}"


BLOCKS = [
    Block(page, text[: found.start()].count("\n") + 1, found[1], found[2])
    for page, text in PAGES.items()
    for found in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
]
RUN_WHOLE = ("docs/evaluation.md", "docs/console.md")
"""Pages whose commands are run, one after the other; those of docs/own_reward.md are in tests/reliability."""
NOT_RUN = {
    "docs/evaluation.md": "what is read is written by the page's commands, which run it",
    "docs/diagnostics.md": "reads what a whole quickstart with `TokenExport` has written",
}
"""Pages whose Python cannot be run by itself."""
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


def test_every_test_file_that_is_named_exists():
    named = {file for text in PAGES.values() for file in re.findall(r"tests/[\w/]+\.py", text)}
    assert len(named) > 40
    assert [file for file in sorted(named) if not (ROOT / file).is_file()] == []


@pytest.mark.parametrize("page", ["docs/pitfalls.md", "docs/console.md"])
def test_every_key_that_is_named_is_on_a_chart(page):
    sections = "|".join(
        {re.match(r"\(?(\w+)", pattern)[1] for charts in LAYOUT.values() for pattern in charts.values()}
    )
    keys = set(re.findall(rf"`((?:{sections}|drift)/[^`*]*)`", PAGES[page])) - TABLES
    patterns = [pattern for charts in LAYOUT.values() for pattern in charts.values()]
    assert len(keys) > 10
    assert [k for k in sorted(keys) if not any(re.fullmatch(p, k.replace("<name>", "x")) for p in patterns)] == []


def anchors(text):
    """What GitHub and mkdocs call the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)\s#]*)(?:#([^)]*))?\)", PAGES[page]):
        if "://" in target:
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), anchor


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=str)
def test_python_in_the_documentation_runs(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = compile(block.code, str(block), "exec")
    if block.page not in NOT_RUN:
        exec(code, vars(callbacks) | {"__name__": "example"})


class ParsedOnly(cli.DRPOCommandLine):
    """Reads a configuration, and checks classes and settings, without building anything."""

    def instantiate_classes(self):
        pass

    def _run_subcommand(self, subcommand):
        pass


def parsed(monkeypatch, *arguments):
    """What the command line makes of its arguments."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["drpo", *map(str, arguments)])
    cli.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    return ParsedOnly(
        cli.PolicyModule,
        cli.RolloutDataModule,
        save_config_callback=None,
        **cli.COMMAND_LINE,
    ).config


def documents(block):
    """What a YAML block holds."""
    return list(yaml.safe_load_all(block.code))


def as_configuration(block):
    """A snippet as a configuration: a list is one of callbacks."""
    (content,) = documents(block)
    return block.code if isinstance(content, dict) else yaml.safe_dump({"trainer": {"callbacks+": content}})


OWN = "from drpo_lightning.callbacks import RewardCallback\n" + "".join(
    f"class {name}(RewardCallback):\n"
    "    def __init__(self, column='answer', weight=1.0): ...\n"
    "    def score(self, batch): ...\n"
    for name in ("EvenSum", "Closeness", "RunsTests", "Mine")
)
"""The classes that pages speak of."""


@pytest.fixture
def own_rewards(tmp_path, monkeypatch):
    """A module of rewards, for configurations that name it."""
    (tmp_path / "my_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml" and "apiVersion" in b.code], ids=str)
def test_manifests_in_the_documentation_are_yaml(block):
    assert all(document["kind"] for document in documents(block))


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml" and "apiVersion" not in b.code], ids=str)
def test_a_configuration_in_the_documentation_is_accepted(block, tmp_path, monkeypatch, own_rewards):
    (tmp_path / "block.yaml").write_text(as_configuration(block))
    parsed(monkeypatch, "fit", "--config", "configs/quickstart.yaml", "--config", tmp_path / "block.yaml")


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "bash"], ids=str)
def test_shell_in_the_documentation_is_well_formed(block):
    read = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True, check=False)
    assert (read.returncode, read.stderr) == (0, "")


def commands(block):
    """The `drpo fit` and `drpo validate` lines of a block, as lists of arguments."""
    for line in block.code.replace("\\\n", " ").splitlines():
        found = re.match(r"(?:\S*/)?drpo ((?:fit|validate) .*)", re.sub(r"\s#.*|\s(\|\||>).*", "", line))
        if found:
            yield found[1]


COMMANDS = [(str(block), command) for block in BLOCKS for command in commands(block) if block.language == "bash"]


@pytest.mark.parametrize(("place", "command"), COMMANDS, ids=[place for place, _ in COMMANDS])
def test_options_in_the_documentation_are_accepted(place, command, tmp_path, monkeypatch, own_rewards):
    arguments = cli.with_values_of_flags(shlex.split(command))
    for i, argument in enumerate(arguments):
        if arguments[i - 1] == "--config" and not (ROOT / argument).exists():  # one that the page has shown before
            arguments[i] = "configs/quickstart.yaml"
    parsed(monkeypatch, *[argument for argument in arguments if argument != "--print_config"])


# ---------------------------------------------------------------- `make test-docs`


@pytest.mark.docs
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install 'drpo-lightning[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # of the theme, about a later mkdocs
    result = subprocess.run(build, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    assert "grad_weight" in (tmp_path / "api" / "objectives" / "index.html").read_text()


@pytest.mark.docs
@pytest.mark.parametrize("page", RUN_WHOLE)
def test_the_commands_of_a_page_run_one_after_the_other(page, tmp_path):
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # `drpo`, where it is not activated
    for name in ("configs", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    for block in (b for b in BLOCKS if b.page == page):
        if saved := re.search(rf"{re.escape(block.code)}```\n\nsaved as `([\w.]+)`", PAGES[page]):
            (tmp_path / saved[1]).write_text(block.code)
        if block.language in ("bash", "python"):
            shell = ["bash", "-euc"] if block.language == "bash" else [sys.executable, "-c"]
            run = subprocess.run(
                [*shell, block.code],
                cwd=tmp_path,
                env=os.environ | {"PATH": programs},
                capture_output=True,
                text=True,
                check=False,
            )
            assert run.returncode == 0, f"{block}\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}"
