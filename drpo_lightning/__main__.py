"""The command `drpo`. It imports only what the chosen subcommand needs: `drpo --help` is quick."""

import os
import sys
from importlib import import_module

from drpo_lightning import __version__

COMMANDS = {
    "init": "write a commented configuration: drpo init --model MODEL --task gsm8k --out config.yaml",
    "doctor": "look at the machine, and say what is missing",
    "fit": "train: drpo fit --config configs/quickstart.yaml",
    "validate": "score the policy: drpo validate --config configs/quickstart.yaml --ckpt_path FILE",
    "score": "run the rewards over a file of completions: drpo score --config FILE --data completions.jsonl",
    "serve": "start a vLLM server that VLLMServerEngine samples from: drpo serve MODEL",
    "export": "write the policy of a checkpoint as a Hugging Face folder: drpo export --ckpt FILE --out FOLDER",
    "report": "compare runs in one HTML page: drpo report runs/quickstart --out report.html",
    "completion": "print a script that makes a shell complete all of this: drpo completion bash",
}
"""Every command is a module of the package with a `main(arguments)`, except for Lightning's."""
OF_LIGHTNING = ("fit", "validate")
HELP = "\n".join(
    [
        f"drpo {__version__}: reinforcement learning of language models with a visible trust region",
        "\nusage: drpo COMMAND [OPTIONS]\n\ncommands:",
        *(f"  {name:<12}{says}" for name, says in COMMANDS.items()),
        "\n`drpo COMMAND --help` lists the options of a command; `drpo fit --print_config` prints a configuration.\n",
    ]
)


def main() -> None:
    """Hands over to the subcommand."""
    # Read by OpenMP when torch is imported. Threads that spin while they wait stall whoever shares their cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # As with `python -m`: a reward in a module of the working directory is found.
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    arguments = sys.argv[1:]
    command = arguments[0] if arguments else "--help"
    if command in OF_LIGHTNING:
        if not any(argument.startswith("--verbose") for argument in arguments):
            import_module("drpo_lightning.noise").quieten()
        import_module("drpo_lightning.cli").main()
    elif command in COMMANDS:
        import_module(f"drpo_lightning.{command}").main(arguments[1:])
    elif command in ("-h", "--help"):
        print(HELP)  # noqa: T201
    elif command == "--version":
        print(__version__)  # noqa: T201
    else:
        print(f"drpo: no command {command!r}\n\n{HELP}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


if __name__ == "__main__":
    main()
