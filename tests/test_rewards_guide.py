"""docs/rewards.md: its configurations are accepted, its rows are read, and it leaves no reward out."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

from drpo_lightning import callbacks
from drpo_lightning.rewards import Reward
from drpo_lightning.rewards.code_cases import code_cases

GUIDE = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
OWN = """
from drpo_lightning.callbacks import RewardCallback


class RunsTests(RewardCallback):
    def __init__(self, column: str):
        super().__init__()

    def score(self, batch):
        return []
"""


def listed():
    """Each callback in the guide's configurations."""
    for kind, block in BLOCKS:
        if kind == "yaml":
            content = yaml.safe_load(block)
            yield from content["trainer"]["callbacks"] if isinstance(content, dict) else content


@pytest.mark.parametrize("callback", list(listed()), ids=lambda callback: callback["class_path"])
def test_a_configuration_in_the_guide_is_accepted(callback, monkeypatch):
    own = ModuleType("my_rewards")
    exec(OWN, vars(own))
    monkeypatch.setitem(sys.modules, "my_rewards", own)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    assert parser.parse_object({"callbacks": [callback]}).callbacks[0].class_path == callback["class_path"]


def test_the_guides_tests_of_programs_are_read():
    rows = [json.loads(line) for kind, block in BLOCKS if kind == "json" for line in block.splitlines()]
    assert [len(code_cases(row["tests"])) for row in rows if "tests" in row] == [2, 1, 1]


def test_every_reward_is_in_the_guide():
    rewards = [name for name in callbacks.__all__ if issubclass(getattr(callbacks, name), Reward)]
    assert len(rewards) > 10
    assert [name for name in rewards if f"`{name}`" not in GUIDE] == []
