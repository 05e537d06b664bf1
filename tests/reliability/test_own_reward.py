"""docs/own_reward.md, done as it is written: its files, its commands in their order, and what it says they print."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from drpo_lightning.__main__ import main

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "docs" / "own_reward.md").read_text(), re.DOTALL | re.MULTILINE)


def command(block):
    return shlex.split(block.replace("\\\n", " "))[1:]


def do(kind, block, number):
    """Writes a file, or runs a command; a reward that was written anew is imported anew."""
    if kind == "bash":
        sys.modules.pop("my_rewards", None)
        sys.argv = ["drpo", *command(block)]
        main()
    elif kind == "json":
        Path("completions.jsonl").write_text(block)
    elif match := re.match(r"# (\S+)\n", block):
        Path(match[1]).write_text(block + f"# version {number}\n")  # another length: no stale byte code


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with what the guide uses of a clone."""
    for name in ("configs", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    return tmp_path


@pytest.mark.reliability
@pytest.mark.filterwarnings("default")
def test_the_guide_works_as_it_is_written(clone, capfd):
    output = []
    for number, (kind, block) in enumerate(BLOCKS):
        fails = kind == "bash" and "validation-000000.jsonl" in block
        if not fails:
            do(kind, block, number)
        else:
            with pytest.raises(SystemExit) as exit_info:
                do(kind, block, number)
            assert exit_info.value.code == 1
        output.append(capfd.readouterr())
    ran = [i for i, (kind, _) in enumerate(BLOCKS) if kind == "bash"]
    first, validated, faulty, trained, isolated = (output[i] for i in ran)
    figures = [line.split()[:6] for line in BLOCKS[ran[0] + 1][1].splitlines() if "%" in line]
    assert [line.split()[:6] for line in first.out.splitlines() if "%" in line] == figures
    assert "Held-out prompts" in validated.out
    assert re.search(r"reward 'closeness' raised ValueError.*; it does so for prompt", faulty.err)
    assert "16 updates on 4 rollouts" in trained.out
    assert re.search(r"closeness +0.500 .* 0.0% +0.0%", isolated.out)
    # What section 3 ends with.
    do("bash", BLOCKS[ran[2]][1], 0)
    assert "2000 samples" in capfd.readouterr().out
    (log,) = Path("runs/quickstart").glob("version_*")
    assert json.loads((log / "samples" / "validation-000000.jsonl").read_text().splitlines()[0])["rewards"].keys() == {
        "exact_match",
        "closeness",
    }
