"""The completion script, in a real bash."""

import shutil
import subprocess

import pytest

from drpo_lightning.__main__ import COMMANDS
from drpo_lightning.completion import options_of, script

OPTIONS = {"fit": ["--config", "--ckpt_path", "--data.num_prompts"], "export": ["--ckpt", "--out"]}


def completed(*words):
    """What bash offers for the last of some words."""
    line = " ".join(words)
    program = f"""{script("bash", OPTIONS)}
COMP_WORDS=({line} {'""' if words[-1] == "''" else ""})
COMP_CWORD={len(words) - 1}
_drpo
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["drpo", "f"], ["fit"]),
        (["drpo", "''"], ["fit", "export"]),
        (["drpo", "fit", "--c"], ["--config", "--ckpt_path"]),
        (["drpo", "fit", "--config", "a.yaml", "--data"], ["--data.num_prompts"]),
        (["drpo", "export", "--c"], ["--ckpt"]),
        (["drpo", "fit", "--config", "conf"], []),  # files, which bash finds by itself
        (["drpo", "nothing", "--c"], []),
    ],
)
def test_bash_completes_commands_and_options(words, expected):
    assert completed(*words) == expected


def test_the_options_of_a_command_are_those_of_its_help():
    assert options_of("report") == ["--help", "--out"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_every_command_and_option_is_in_the_other_shells_scripts(shell):
    text = script(shell, OPTIONS)
    for command, options in OPTIONS.items():
        assert command in text
        assert all(option.removeprefix("--") in text for option in options)


def test_every_command_can_be_imported():
    for command in COMMANDS:
        assert callable(
            __import__(f"drpo_lightning.{'cli' if command in ('fit', 'validate') else command}", fromlist=["main"]).main
        )
