"""The command `drpo`. It imports only what the chosen subcommand needs: `drpo --help` is quick."""

import os
import sys

from drpo_lightning import __version__

HELP = f"""drpo {__version__}: reinforcement learning of language models with a visible trust region

usage: drpo COMMAND [OPTIONS]

commands:
  fit        train:              drpo fit --config configs/quickstart.yaml
  validate   score the policy:   drpo validate --config configs/quickstart.yaml --ckpt_path FILE
  export     write the policy of a checkpoint as a Hugging Face folder: drpo export --ckpt FILE --out FOLDER
  report     compare runs in one HTML page: drpo report runs/quickstart --out report.html

`drpo COMMAND --help` lists the options of a command; `drpo fit --print_config` prints a configuration.
"""


def main() -> None:
    """Hands over to the subcommand."""
    # Read by OpenMP when torch is imported. Threads that spin while they wait stall whoever shares their cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # As with `python -m`: a reward in a module of the working directory is found.
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    arguments = sys.argv[1:]
    command = arguments[0] if arguments else "--help"
    if command in ("fit", "validate"):
        from drpo_lightning.cli import main as run

        run()
    elif command == "export":
        from drpo_lightning.export import main as export

        export(arguments[1:])
    elif command == "report":
        from drpo_lightning.report import main as report

        report(arguments[1:])
    elif command in ("-h", "--help"):
        print(HELP)  # noqa: T201
    elif command == "--version":
        print(__version__)  # noqa: T201
    else:
        print(f"drpo: no command {command!r}\n\n{HELP}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


if __name__ == "__main__":
    main()
