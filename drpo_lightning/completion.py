"""`drpo completion`: the script that makes a shell complete commands and their options."""

import argparse
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

from drpo_lightning.__main__ import COMMANDS

OPTION = re.compile(r"(?<![\w-])--[A-Za-z][\w.-]*")
BASH = """\
# drpo in bash:  drpo completion bash > ~/.local/share/bash-completion/completions/drpo
_drpo() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" options=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    options="{commands}"
  else
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
  fi
  case "$word" in
    -*) ;;
    *) if [ "$COMP_CWORD" -gt 1 ]; then COMPREPLY=(); return; fi ;;
  esac
  COMPREPLY=($(compgen -W "$options" -- "$word"))
}}
complete -o default -o bashdefault -F _drpo drpo
"""
ZSH_HEAD = """\
# drpo in zsh:  drpo completion zsh > ~/.drpo.zsh; echo 'source ~/.drpo.zsh' >> ~/.zshrc
autoload -U +X bashcompinit && bashcompinit
"""
FISH_HEAD = "# drpo in fish:  drpo completion fish > ~/.config/fish/completions/drpo.fish\n"


def options_of(command: str) -> list[str]:
    """Every option that a command's own `--help` shows.

    Raises:
        RuntimeError: if the help fails.
    """
    call = [sys.executable, "-m", "drpo_lightning", command, "--help"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"drpo {command} --help: {done.stderr.strip()[-500:]}")
    return sorted({option.rstrip(".") for option in OPTION.findall(done.stdout)})


def script(shell: str, options: Mapping[str, Sequence[str]]) -> str:
    """The completion script.

    Args:
        shell: `bash`, `zsh` or `fish`.
        options: options by command.
    """
    if shell == "fish":
        lines = [f"complete -c drpo -n __fish_use_subcommand -f -a '{' '.join(options)}'"]
        for command, names in options.items():
            condition = f"'__fish_seen_subcommand_from {command}'"
            lines += [f"complete -c drpo -n {condition} -l '{name.removeprefix('--')}'" for name in names]
        return FISH_HEAD + "\n".join(lines) + "\n"
    cases = "\n".join(f'      {command}) options="{" ".join(names)}" ;;' for command, names in options.items())
    text = BASH.format(commands=" ".join(options), cases=cases)
    return ZSH_HEAD + text.partition("\n")[2] if shell == "zsh" else text


def main(arguments: Sequence[str]) -> None:
    """Prints the script."""
    parser = argparse.ArgumentParser(prog="drpo completion", description="Prints a completion script for a shell.")
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])
    shell = parser.parse_args(arguments).shell
    print(script(shell, {command: options_of(command) for command in COMMANDS}), end="")  # noqa: T201
