"""The command `drpo score`: the rewards of a configuration over a file of completions, without trainer and model."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, NamedTuple

from drpo_lightning.errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor

    from drpo_lightning.rewards import Reward, RewardBatch, RewardScores

SAMPLE_KEYS = ("prompt", "completion", "completion_ids", "finish_reason", "columns")
MAX_TEXT_CHARACTERS = 400
"""Of a prompt or completion that is shown."""
DESCRIPTION = """Scores completions by the rewards of a configuration.

Each row of the file has a `prompt` and a `completion`, and may have a `finish_reason` (`stop` by default) and
`completion_ids`; its other columns are the data set's, unless they stand in an object `columns`, as in the files that
`SampleWriter` and failing rewards write. Where token ids are missing, the policy's tokenizer makes them."""


class Settings(NamedTuple):
    """What a configuration says of the scoring.

    Attributes:
        rewards: the rewards among its callbacks.
        tokenizer: folder or hub name of the policy.
        trust_remote_code: whether code that comes with the tokenizer may run.
    """

    rewards: "list[Reward]"
    tokenizer: str
    trust_remote_code: bool


def read_settings(arguments: list[str]) -> Settings:
    """Reads a configuration as `drpo fit` does, and builds its rewards and nothing else.

    Args:
        arguments: of the command line of `drpo fit`.

    Raises:
        SettingError: if it has no rewards, or a reward refuses a setting.
    """
    from lightning.pytorch import Trainer
    from lightning.pytorch.cli import LightningArgumentParser

    from drpo_lightning.cli import COMMAND_LINE, DRPOCommandLine
    from drpo_lightning.datamodules import RolloutDataModule
    from drpo_lightning.modules import PolicyModule

    class Configuration(DRPOCommandLine):
        """A configuration that is read, and no more."""

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            super().add_arguments_to_parser(parser)
            # What else stands in a saved configuration: `validate` has the options of `fit`, and `verbose`.
            parser.add_method_arguments(Trainer, "validate", skip=set(self.subcommands()["validate"]))

        def instantiate_classes(self) -> None:
            pass

    with ExitStack() as held, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        config = Configuration(
            PolicyModule,
            RolloutDataModule,
            held=held,
            **COMMAND_LINE,
            args=arguments,
            run=False,
        ).config
    return Settings(_rewards(config.trainer.callbacks), config.model.model, config.model.trust_remote_code)


def _rewards(callbacks: Any) -> "list[Reward]":  # noqa: ANN401
    """The rewards among some callbacks of a configuration."""
    from jsonargparse import ArgumentParser
    from lightning.pytorch import Callback

    from drpo_lightning.rewards import Reward

    listed = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    chosen = [callback for callback in listed if issubclass(resolve_name(callback.class_path), Reward)]
    if not chosen:
        raise SettingError("the configuration lists no reward under `trainer.callbacks`")
    parser = ArgumentParser()
    parser.add_argument("--rewards", type=list[Callback])
    try:
        rewards: list[Reward] = parser.instantiate(parser.parse_object({"rewards": chosen})).rewards
    except ValueError as error:
        raise SettingError(str(error)) from error
    return rewards


def read_samples(file: str, tokenizer_name: str, *, trust_remote_code: bool = False) -> "RewardBatch":
    """Reads a file of completions, see `DESCRIPTION`.

    Args:
        file: JSONL, CSV or Parquet, as `FilePrompts` reads it.
        tokenizer_name: folder or hub name of a tokenizer, which is loaded if a row has no token ids, or a chat for a
            prompt.
        trust_remote_code: whether code that comes with it may run.

    Raises:
        SettingError: if the file cannot be read, a row has no completion, or the tokenizer is missing.
    """
    from drpo_lightning.datamodules import FilePrompts
    from drpo_lightning.rewards import RewardBatch

    rows = FilePrompts(file).load()
    for i, row in enumerate(rows):
        if not isinstance(row.get("completion"), str):
            raise SettingError(f"{file}, row {i}: no text in `completion`; it has {sorted(row)}")
        if row.setdefault("finish_reason", "stop") not in ("stop", "length"):
            raise SettingError(f"{file}, row {i}: `finish_reason` must be stop or length, got {row['finish_reason']!r}")
    if any("completion_ids" not in row or not isinstance(row["prompt"], str) for row in rows):
        _tokenize(rows, tokenizer_name, trust_remote_code=trust_remote_code)
    columns = [_columns(row) for row in rows]
    names = sorted(set().union(*columns))
    return RewardBatch(
        prompts=[row["prompt"] for row in rows],
        completions=[row["completion"] for row in rows],
        completion_ids=[row["completion_ids"] for row in rows],
        finish_reasons=[row["finish_reason"] for row in rows],
        columns={name: [row.get(name) for row in columns] for name in names},
    )


def _columns(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The data set's columns in a row."""
    if isinstance(columns := row.get("columns"), Mapping):
        return columns
    return {name: value for name, value in row.items() if name not in SAMPLE_KEYS}


def _tokenize(rows: list[dict[str, Any]], name: str, *, trust_remote_code: bool) -> None:
    """Adds the token ids of completions, with an end of sequence where it stopped, and the texts of chats."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise SettingError(
            f"rows without `completion_ids`, or with a chat for a prompt, take the policy's tokenizer, and {name!r} "
            f"cannot be loaded: {error}. Give another with --tokenizer"
        ) from error
    for row in rows:
        if not isinstance(row["prompt"], str):
            row["prompt"] = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        if "completion_ids" not in row:
            end = [tokenizer.eos_token_id] if row["finish_reason"] == "stop" else []
            row["completion_ids"] = tokenizer(row["completion"], add_special_tokens=False).input_ids + end


def score(settings: Settings, batch: "RewardBatch") -> "tuple[RewardScores, Tensor]":
    """Scores completions as a training would.

    Returns:
        What the rewards say, and the weighted sums, NaN for samples that are dropped.

    Raises:
        SettingError: if a row is nothing that a reward can score completions of.
        RewardError: if a reward fails and is to end the run.
    """
    from drpo_lightning.datamodules.scored_rollout import check_columns
    from drpo_lightning.rewards import combine_rewards, score_rewards

    check_columns([batch.sample(i).columns for i in range(len(batch))], settings.rewards, "--data")
    try:
        scores = score_rewards(settings.rewards, batch)
    finally:
        for reward in settings.rewards:
            reward.close()
    weights = {reward.name: reward.weight for reward in settings.rewards}
    return scores, combine_rewards(scores.parts, weights, scores.dropped)


def print_scores(settings: Settings, scores: "RewardScores", total: "Tensor") -> None:
    """Prints a line of figures for each reward, and for their sum."""
    from drpo_lightning.console import figure, print_table

    num_samples = len(total)
    rows = []
    for reward in settings.rewards:
        failed = scores.failures.get(reward.name)
        kinds = None if failed is None else [failure.kind for failure in failed.values()]
        rows.append(
            [
                reward.name,
                figure(reward.weight),
                *_figures(scores.parts[reward.name]),
                *("-" if kinds is None else f"{kinds.count(kind) / num_samples:.1%}" for kind in ("error", "timeout")),
                figure(1000 * scores.seconds[reward.name] / num_samples),
            ]
        )
    seconds = figure(1000 * sum(scores.seconds.values()) / num_samples)
    rows.append(["sum", "", *_figures(total), "", "", seconds])
    header = ["reward", "weight", "mean", "std", "min", "max", "scored", "errors", "timeouts", "ms/sample"]
    print_table(f"{num_samples} sample{'' if num_samples == 1 else 's'}", header, rows)


def _figures(values: "Tensor") -> list[str]:
    """Mean, standard deviation (of these samples), minimum and maximum of what is not NaN, and its share."""
    from drpo_lightning.console import figure

    found = values[~values.isnan()].double()
    share = f"{len(found) / len(values):.1%}"
    if not len(found):
        return ["-"] * 4 + [share]
    numbers = (found.mean(), found.std(correction=0), found.min(), found.max())
    return [*(figure(float(number)) for number in numbers), share]


def print_samples(batch: "RewardBatch", scores: "RewardScores", total: "Tensor", num_samples: int) -> None:
    """Prints the samples with the lowest and with the highest sums, and the dropped ones."""
    order = [int(i) for i in total.argsort(stable=True) if not total[i].isnan()]
    dropped = [int(i) for i in total.isnan().nonzero()]
    highest = order[num_samples:][::-1]
    for title, chosen in (("lowest", order), ("highest", highest), ("dropped", dropped)):
        for i in chosen[:num_samples]:
            print(_sample_text(title, i, batch, scores, total))  # noqa: T201


def _sample_text(title: str, i: int, batch: "RewardBatch", scores: "RewardScores", total: "Tensor") -> str:
    parts = ", ".join(f"{name} {_text(part[i])}" for name, part in scores.parts.items())
    lines = [
        f"{title}: row {i}, sum {_text(total[i])} ({parts})",
        f"  prompt:     {_shortened(batch.prompts[i])}",
        f"  completion: {_shortened(batch.completions[i])}",
    ]
    lines += [
        f"  {name} failed ({failures[i].kind}): {failures[i].reason}"
        for name, failures in scores.failures.items()
        if i in failures
    ]
    return "\n".join(lines)


def _text(value: "Tensor") -> str:
    return "none" if value.isnan() else f"{float(value):.4g}"


def _shortened(text: str) -> str:
    """A text in one line, as Python writes it, with its middle cut out if it is long."""
    if len(text) > MAX_TEXT_CHARACTERS:
        half = MAX_TEXT_CHARACTERS // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return repr(text)


def write_scores(file: str, batch: "RewardBatch", scores: "RewardScores", total: "Tensor") -> None:
    """Writes the samples with their scores as JSON lines, in the order of the rows.

    Each has `prompt`, `completion`, `finish_reason`, `completion_ids`, `columns`, `reward` (the sum, null if the
    sample is dropped), `rewards` (by name, null where one does not apply) and `failures` (by name).

    Raises:
        SettingError: if the file cannot be written.
    """
    from drpo_lightning.rewards.scoring import json_score

    try:
        with Path(file).open("w", encoding="utf-8") as opened:
            for i in range(len(batch)):
                row = vars(batch.sample(i)) | {
                    "reward": json_score(total[i]),
                    "rewards": {name: json_score(part[i]) for name, part in scores.parts.items()},
                    "failures": {name: vars(found[i]) for name, found in scores.failures.items() if i in found},
                }
                opened.write(json.dumps(row, ensure_ascii=False, default=repr) + "\n")
    except OSError as error:
        raise SettingError(f"the scores cannot be written to {file!r}: {error.strerror}") from error


def main(arguments: Sequence[str]) -> None:
    """`drpo score --config FILE --data FILE`."""
    parser = argparse.ArgumentParser(
        prog="drpo score",
        description=DESCRIPTION,
        epilog="Other options are those of `drpo fit`, such as --trainer.callbacks+=my_rewards.Mine to add a reward.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, action="append", metavar="FILE", help="of a training")
    parser.add_argument("--data", required=True, metavar="FILE", help="completions: .jsonl, .csv or .parquet")
    parser.add_argument("--output", metavar="FILE", help="JSONL to write the samples with their scores to")
    parser.add_argument("--num_samples", type=int, default=3, help="how many of the lowest and highest are shown")
    parser.add_argument("--tokenizer", metavar="NAME", help="folder or hub name; by default the policy's")
    options, overrides = parser.parse_known_args(arguments)

    from drpo_lightning.rewards import RewardError

    try:
        settings = read_settings([*(f"--config={file}" for file in options.config), *overrides])
        tokenizer = options.tokenizer or settings.tokenizer
        batch = read_samples(options.data, tokenizer, trust_remote_code=settings.trust_remote_code)
        scores, total = score(settings, batch)
        print_scores(settings, scores, total)
        print_samples(batch, scores, total, options.num_samples)
        if options.output:
            write_scores(options.output, batch, scores, total)
            print(f"scores: {options.output}")  # noqa: T201
    except SettingError as error:
        print(f"drpo: error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except RewardError as error:
        print(f"drpo: error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
