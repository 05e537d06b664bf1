"""`drpo fit` and `drpo validate`: Lightning's command line over our module and data module."""

import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from inspect import signature
from typing import Any

from jsonargparse import Namespace, set_parsing_settings
from jsonargparse.typing import restricted_number_type
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning_utilities.core.rank_zero import rank_zero_info

from drpo_lightning.callbacks import RolloutProgress, RolloutStatistics, ValidationTable
from drpo_lightning.callbacks.end_request import Terminated
from drpo_lightning.datamodules import RolloutDataModule
from drpo_lightning.disk import DiskFullError
from drpo_lightning.errors import SettingError
from drpo_lightning.hints import imported, with_hints
from drpo_lightning.modules import PolicyModule
from drpo_lightning.modules.checks import check_optimizer_settings, check_trainer
from drpo_lightning.output_folders import claim_log_folders, claim_output_folders
from drpo_lightning.resume import (
    checkpoint_folders,
    checkpoint_to_resume,
    go_on_as_its_run,
    read_notes,
    say_where_it_goes_on,
)
from drpo_lightning.rewards import RewardError
from drpo_lightning.saved_config import SaveUnresolvedConfig, note_interpolations

TRAINER_DEFAULTS = {
    "max_epochs": 100,  # an epoch is a rollout
    "log_every_n_steps": 1,
    "num_sanity_val_steps": -1,  # the validation before the first update
    "use_distributed_sampler": False,  # the data module gives every rank its own prompts
}

COMMAND_LINE: dict[str, Any] = {
    "parser_kwargs": {"parser_mode": "omegaconf+", "allow_abbrev": False},
    "trainer_defaults": TRAINER_DEFAULTS,
    "auto_configure_optimizers": False,
    "seed_everything_default": 0,
}
"""How configurations are read, whatever is done with them."""

Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)], docstring="What numpy takes as a seed.")

SECTIONS = {"model": PolicyModule, "data": RolloutDataModule}


class DRPOCommandLine(LightningCLI):
    """Lightning's command line with what belongs together linked.

    Args:
        args: those of `LightningCLI`.
        held: keeps the folders that the run writes to, until it is closed.
        kwargs: those of `LightningCLI`.
    """

    def __init__(self, *args: Any, held: ExitStack | None = None, **kwargs: Any) -> None:  # noqa: ANN401
        self.held = held or ExitStack()
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """`fit` and `validate`."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
        }

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:  # noqa: ANN401
        """A parser whose errors are one message, with hints; Lightning's stand below a page of options."""
        parser = super().init_parser(**kwargs)
        parser.print_usage = lambda *_: None  # type: ignore[method-assign]
        report = parser.error
        parser.error = lambda message, ex=None: report(with_hints(message, option_names(parser)), ex)  # type: ignore[method-assign]
        return parser

    def _prepare_subcommand_parser(self, klass: Any, subcommand: str, **kwargs: Any) -> LightningArgumentParser:  # noqa: ANN401
        """Adds `--verbose` to `fit`; `validate` has Lightning's, which is for where our own table is not asked for."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument("--verbose", type=bool, default=False, help="print every metric of every rollout")
        else:
            parser.set_defaults({"verbose": False})
        return parser

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed; `true`, which is one that nobody chose, is refused: a run could not be repeated."""
        seed = self.seed_everything_default
        parser.add_argument("--seed_everything", type=Seed, default=seed, help="of all random numbers")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Gives the data module the policy's name, and the policy the temperature of the sampling."""
        parser.add_argument("--vars", type=dict, default={}, help="free values for ${vars.name} elsewhere")
        parser.link_arguments("model.model", "data.model")
        parser.link_arguments("data.sampling.temperature", "model.temperature")
        parser.link_arguments("model.trust_remote_code", "data.trust_remote_code")

    def instantiate_classes(self) -> None:
        """Builds everything; a value that a class refuses is an error of the command line."""
        try:
            super().instantiate_classes()
            check_trainer(self.trainer)
            check_optimizer_settings(self.model.make_optimizer, self.model.make_lr_scheduler)
        except ValueError as error:
            self.parser.error(with_hints(error))
        except (TypeError, AttributeError) as error:  # null passes for any type in the parser
            if not (nulls := self._unexpected_nulls()):
                raise
            self.parser.error(f"{error}; null in the configuration, which has a default: {', '.join(nulls)}")

    def _unexpected_nulls(self) -> list[str]:
        """Settings of the model and the data that are null and are not by default."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        defaults = dict(self._parser(self.subcommand).get_defaults().items())

        def default(name: str) -> Any:  # noqa: ANN401
            holder, has_class, argument = name.rpartition(".init_args.")
            if not has_class:
                section, _, argument = name.partition(".")
                parameter = signature(SECTIONS[section]).parameters.get(argument)
                return defaults.get(name) if parameter is None else parameter.default
            return signature(imported(config[f"{holder}.class_path"])).parameters[argument].default

        ours = [name for name, value in config.items() if value is None and name.partition(".")[0] in SECTIONS]
        return [name for name in ours if default(name) is not None]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:  # noqa: ANN401
        """Adds the statistics of rollouts and the progress bar, where the configuration has none of its own."""
        trainer_config = self._get(self.config_init, "trainer")
        if not isinstance(trainer_config, Namespace):
            raise SettingError(f"`trainer` must hold settings, got {trainer_config!r}")
        callbacks = trainer_config.get("callbacks") or []
        callbacks = [callbacks] if isinstance(callbacks, Callback) else callbacks
        _check_callbacks(callbacks)
        added: list[Callback] = []
        if not any(isinstance(callback, RolloutStatistics) for callback in callbacks):
            added.append(RolloutStatistics())
        wants_bar = trainer_config.get("enable_progress_bar") is not False
        if wants_bar and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            added.append(RolloutProgress(verbose=bool(self._get(self.config_init, "verbose"))))
        trainer_config["callbacks"] = [*callbacks, *added]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*AMP with fp16 is not supported on CPU")  # an error below
            try:
                trainer = super().instantiate_trainer(**kwargs)
            except (TypeError, OverflowError) as error:  # of `devices`, which may be numbers, lists and words
                raise SettingError(f"`trainer` cannot be made: {error}") from error
        if trainer_config.get("precision") in ("16-mixed", "16", 16) and trainer.strategy.root_device.type == "cpu":
            raise SettingError(
                "`trainer.precision` 16-mixed needs a CUDA GPU: on a CPU Lightning would take bf16-mixed instead; set "
                "that, or 32-true"
            )
        return trainer

    def before_fit(self) -> None:
        """Finds the checkpoint to go on from; from `last`, the run goes on in its log folder."""
        config = self._loading_tensors_only("fit")
        is_last = config.get("ckpt_path") == "last"
        config["ckpt_path"] = path = checkpoint_to_resume(self.trainer, config.get("ckpt_path"))
        if path is not None:
            # Lightning leaves it out in the middle of an epoch only; it would change what was loaded.
            self.trainer.num_sanity_val_steps = 0
            notes = read_notes(path, weights_only=config["weights_only"])
            say_where_it_goes_on(self.trainer, path, notes)
            if is_last:
                go_on_as_its_run(self.trainer, notes, self.held)
                return
        claim_output_folders(self.trainer, self.held)
        if is_last:
            rank_zero_info("`--ckpt_path last`: there is no checkpoint yet, the run starts from the beginning")

    def before_validate(self) -> None:
        """Finds the checkpoint to validate."""
        config = self._loading_tensors_only("validate")
        asked = config.get("ckpt_path")
        config["ckpt_path"] = checkpoint_to_resume(self.trainer, asked)
        if asked == "last" and config["ckpt_path"] is None:
            folders = ", ".join(map(str, checkpoint_folders(self.trainer)))
            raise SettingError(
                f"`--ckpt_path last`: there is no checkpoint in {folders or 'any folder of these loggers'}; train "
                "first, or leave it out to validate `model.model` as it is"
            )
        if not any(isinstance(callback, ValidationTable) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            config["verbose"] = True
        claim_log_folders(self.trainer, self.held)

    def _loading_tensors_only(self, subcommand: str) -> Any:  # noqa: ANN401
        """The subcommand's settings; a checkpoint runs no code that a pickle may bring, unless that is asked for."""
        config = self.config_init[subcommand]
        if config.get("weights_only") is None:
            config["weights_only"] = True
        return config

    def _parse_ckpt_path(self) -> None:
        """Lets the configuration win over hyperparameters that a checkpoint may hold."""


def _check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuses what an item without a class becomes: Lightning's base class, which does nothing."""
    for i, callback in enumerate(callbacks):
        if type(callback) is Callback:
            raise SettingError(f"`trainer.callbacks` item {i} has no `class_path`; name its class, or leave it out")


def option_names(parser: LightningArgumentParser) -> set[str]:
    """Every option of a parser and of its subcommands."""
    names = {action.dest for action in parser._actions}
    for action in parser._actions:
        for subparser in (action.choices or {}).values() if isinstance(action.choices, dict) else ():
            names |= option_names(subparser)
    return names


def with_values_of_flags(arguments: Sequence[str]) -> list[str]:
    """A command line on which `--verbose` alone means `--verbose=true`."""
    following = [*arguments[1:], ""]
    return [
        "--verbose=true" if argument == "--verbose" and after.lower() not in ("true", "false") else argument
        for argument, after in zip(arguments, following, strict=False)
    ]


def main() -> None:
    """Runs the subcommand in `sys.argv`."""
    sys.argv = [*sys.argv[:1], *with_values_of_flags(sys.argv[1:])]
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    note_interpolations()
    try:
        with ExitStack() as held:
            DRPOCommandLine(
                PolicyModule,
                RolloutDataModule,
                held=held,
                save_config_callback=SaveUnresolvedConfig,
                save_config_kwargs={"overwrite": True},
                **COMMAND_LINE,
            )
    except (SettingError, DiskFullError, MisconfigurationException) as error:
        sys.exit(f"drpo: error: {with_hints(error)}")
    except RewardError as error:
        if error.__cause__ is not None:  # where in the reward
            traceback.print_exception(error.__cause__)
        sys.exit(f"drpo: error: {error}")
    except Terminated as error:
        sys.exit(error.exit_code)
