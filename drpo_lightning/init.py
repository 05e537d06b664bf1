"""`drpo init`: a commented configuration for a model, a task and a machine, to be read and changed."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from drpo_lightning.errors import SettingError

GROUP_SIZE = 8
NUM_UPDATES = 4
MIN_PROMPTS = 64
DATA = "prompts.jsonl"
"""The file of the task `file`, where none is named."""
MATH_SUFFIX = '"\\n\\nReason step by step, and put the final answer within \\\\boxed{}."'


class Task(NamedTuple):
    """What is learned.

    Attributes:
        says: one line for `--help`.
        reward: lines of the reward callback.
        prompts: lines of `data.prompts` and `data.val_prompts`.
        prompt_format: `raw` or `chat`.
        max_tokens: most tokens of a completion.
        learning_rate: to start with.
    """

    says: str
    reward: str
    prompts: str
    prompt_format: str
    max_tokens: int
    learning_rate: str = "1.0e-6"


TASKS = {
    "arithmetic": Task(
        "additions, generated; for models/arithmetic of the quickstart",
        """- class_path: drpo_lightning.callbacks.ExactMatchReward""",
        """
prompts:
  class_path: drpo_lightning.datamodules.ArithmeticPrompts
val_prompts:
  class_path: drpo_lightning.datamodules.ArithmeticPrompts
  init_args: {split: validation}""",
        "raw",
        8,
        "1.5e-4",
    ),
    "gsm8k": Task(
        "grade-school mathematics, from the Hugging Face hub",
        """- class_path: drpo_lightning.callbacks.NumericAnswerReward # the last number counts""",
        """
prompts:
  class_path: drpo_lightning.datamodules.HubPrompts
  init_args: &gsm8k
    name: openai/gsm8k
    config: main
    prompt_column: question
    suffix: "\\n\\nReason step by step, and end with the answer as a number."
val_prompts:
  class_path: drpo_lightning.datamodules.HubPrompts
  init_args: {<<: *gsm8k, split: test}""",
        "chat",
        1024,
    ),
    "math": Task(
        "DAPO-Math-17k, and AIME 2024 to validate, from the Hugging Face hub",
        """- class_path: drpo_lightning.callbacks.NumericAnswerReward # the number in the last box counts
  init_args: {boxed: true}""",
        f"""
prompts:
  class_path: drpo_lightning.datamodules.HubPrompts
  init_args:
    name: open-r1/DAPO-Math-17k-Processed
    config: en
    columns: {{answer: solution}}
    suffix: &suffix {MATH_SUFFIX}
val_prompts:
  class_path: drpo_lightning.datamodules.HubPrompts
  init_args: {{name: HuggingFaceH4/aime_2024, prompt_column: problem, suffix: *suffix}}""",
        "chat",
        8192,
    ),
    "file": Task(
        "rows of a file of yours (--data), with the columns `prompt` and `answer`",
        """- class_path: drpo_lightning.callbacks.ExactMatchReward # your own: docs/own_reward.md""",
        """
prompts:
  class_path: drpo_lightning.datamodules.SplitPrompts # a tenth is held out
  init_args: &rows
    source:
      class_path: drpo_lightning.datamodules.FilePrompts
      init_args: {path: {DATA}}
    holdout: 0.1
val_prompts:
  class_path: drpo_lightning.datamodules.SplitPrompts
  init_args: {<<: *rows, split: validation}""",
        "chat",
        512,
    ),
}

TEMPLATE = """\
# {says}
#   drpo fit --config {path}                      train
#   drpo fit --config {path} --ckpt_path last     go on after an interruption
#   drpo validate --config {path}                 score the model as it is
#   tensorboard --logdir runs/{name}              look at it
seed_everything: 0
trainer:
  accelerator: {accelerator}
  devices: {devices}
{strategy}  precision: {precision}
  max_epochs: 200 # rollouts; an epoch is a rollout
  check_val_every_n_epoch: 20
  accumulate_grad_batches: {window} # micro-batches per update: {micro_batch} completions at a time on each {place}
  gradient_clip_val: 1.0
  default_root_dir: runs/{name}
  enable_model_summary: false
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {{save_dir: runs, name: {name}, default_hp_metric: false}}
  callbacks:
    # What is learned: the weighted sum of all rewards.
{reward}
    # How far the policy moves, and what the objective makes of it.
    - class_path: drpo_lightning.callbacks.PolicyShift
    - class_path: drpo_lightning.callbacks.Divergence
    - class_path: drpo_lightning.callbacks.MaskStatistics
    - class_path: drpo_lightning.callbacks.MismatchAndDrift
    - class_path: drpo_lightning.callbacks.TokenTable
    - class_path: drpo_lightning.callbacks.ShiftMap
    # What is sampled.
    - class_path: drpo_lightning.callbacks.RolloutStatistics
    - class_path: drpo_lightning.callbacks.CompletionLogger
    - class_path: drpo_lightning.callbacks.SampleWriter
    - class_path: drpo_lightning.callbacks.ValidationTable
    # What stops a run that goes wrong.
    - class_path: drpo_lightning.callbacks.SyncProbe
    - class_path: drpo_lightning.callbacks.Guardrail
    # What is kept.
    - class_path: drpo_lightning.callbacks.Dashboard
    - class_path: drpo_lightning.callbacks.HyperparameterLogger
    - class_path: drpo_lightning.callbacks.ExportPolicy
    - class_path: drpo_lightning.callbacks.RunSummary
    - class_path: drpo_lightning.callbacks.PolicyCheckpoint
      init_args: {{every_n_epochs: 20}}
model:
  model: {model} # a folder, or a name on the Hugging Face hub
  objective:
    class_path: drpo_lightning.objectives.DRPO
    init_args: {{delta: 0.2}} # radius in units of probability; the paper's experiments use 12.5
  optimizer:
    class_path: torch.optim.AdamW
    init_args: {{lr: {learning_rate}, weight_decay: 0.01}}
  aggregation: token_mean
{memory}data:
  engine:
    class_path: drpo_lightning.rollout.VLLMEngine # without vLLM: drpo_lightning.rollout.TransformersEngine, slower
    init_args: {engine}
{prompts}
  prompt_format: {prompt_format} # raw: the prompt as it is; chat: as a user's message in the model's chat template
  num_prompts: {num_prompts} # per rollout
  group_size: {group_size} # completions per prompt
  num_updates: {num_updates} # optimizer updates per rollout
  val_num_samples: 4
  sampling: {{max_tokens: {max_tokens}}}
  seed: ${{seed_everything}}
"""


def configuration(
    *, model: str, task: str, gpus: int = 0, lora: bool = False, data: str = DATA, path: str = "config.yaml"
) -> str:
    """The text of a configuration.

    Args:
        model: folder or hub name of the policy.
        task: one of `TASKS`.
        gpus: how many train; 0 for a CPU.
        lora: trains adapters alone.
        data: the file of the task `file`.
        path: what the configuration will be called, for its comments.

    Raises:
        SettingError: if the task is unknown or a number is out of range.
    """
    if task not in TASKS:
        raise SettingError(f"`--task` must be one of {list(TASKS)}, got {task!r}")
    if gpus < 0:
        raise SettingError(f"`--gpus` must be 0 (a CPU) or positive, got {gpus}")
    chosen = _fitted(TASKS[task], Path(model).expanduser())
    ranks = max(gpus, 1)
    num_prompts = -(-MIN_PROMPTS // ranks) * ranks
    size = num_prompts * GROUP_SIZE // NUM_UPDATES // ranks
    micro_batch = next(n for n in ((4, 2) if gpus else (32, 16, 8, 4, 2)) if size % n == 0)
    strategy = ""
    if gpus > 1:
        strategy = (
            "  strategy:\n    class_path: lightning.pytorch.strategies.ModelParallelStrategy # FSDP2\n"
            f"    init_args: {{data_parallel_size: {gpus}, tensor_parallel_size: 1, "
            "save_distributed_checkpoint: false}\n"
        )
    memory = "  gradient_checkpointing: true # less memory, a third more time\n" if gpus else ""
    if lora:
        memory += "  peft: {r: 16} # adapters alone are trained\n"
    learning_rate = chosen.learning_rate
    if lora and task != "arithmetic":
        learning_rate = "1.0e-5"
    return TEMPLATE.format(
        says=f"DRPO of {model} on {task}: {chosen.says}.",
        path=path,
        name=_run_name(path),
        accelerator="gpu" if gpus else "cpu",
        devices=ranks,
        place="GPU" if gpus else "rank",
        strategy=strategy,
        precision="bf16-mixed # parameters and optimizer stay in float32" if gpus else "32-true",
        window=size // micro_batch,
        micro_batch=micro_batch,
        reward=_indented(chosen.reward, 4),
        model=json.dumps(model),
        learning_rate=learning_rate,
        memory=memory,
        engine="{gpu_memory_utilization: 0.4}"
        if gpus
        else "{dtype: float32, enforce_eager: true} # the trainer's precision",
        prompts=_indented(chosen.prompts.strip().replace("{DATA}", json.dumps(data)), 2),
        prompt_format=chosen.prompt_format,
        num_prompts=num_prompts,
        group_size=GROUP_SIZE,
        num_updates=NUM_UPDATES,
        max_tokens=chosen.max_tokens,
    )


def _fitted(task: Task, folder: Path) -> Task:
    """The task as a model that lies in a folder can do it: without a chat template, within its context."""
    if not (folder / "config.json").is_file():
        return task
    context = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    if context:
        task = task._replace(max_tokens=min(task.max_tokens, context // 2))
    settings = folder / "tokenizer_config.json"
    in_settings = settings.is_file() and "chat_template" in json.loads(settings.read_text(encoding="utf-8"))
    if not in_settings and not (folder / "chat_template.jinja").is_file():
        task = task._replace(prompt_format="raw")
    return task


def _run_name(path: str) -> str:
    """What the runs of a configuration are called: its file's name, as a folder and in YAML."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", Path(path).stem).strip("_") or "run"


def _indented(text: str, spaces: int) -> str:
    return "\n".join(" " * spaces + line for line in text.splitlines())


def main(arguments: Sequence[str]) -> None:
    """Writes the configuration and says what comes next."""
    tasks = "; ".join(f"{name}: {task.says}" for name, task in TASKS.items())
    parser = argparse.ArgumentParser(
        prog="drpo init", description="Writes a commented configuration for a model, a task and a machine."
    )
    parser.add_argument("--model", required=True, help="folder of the policy, or its name on the Hugging Face hub")
    parser.add_argument("--task", required=True, choices=TASKS, help=tasks)
    parser.add_argument("--gpus", type=int, default=None, help="how many train; 0 for a CPU; by default those here")
    parser.add_argument("--lora", action="store_true", help="train adapters alone")
    parser.add_argument("--data", help=f"the file of `--task file`, by default {DATA}")
    parser.add_argument("--out", type=Path, default=Path("config.yaml"))
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    options = parser.parse_args(arguments)
    gpus = options.gpus
    if gpus is None:
        import torch

        gpus = torch.cuda.device_count()
    if options.out.exists() and not options.force:
        parser.error(f"`--out` {str(options.out)!r} exists; give another name, or --force")
    if not options.out.parent.is_dir():
        parser.error(f"`--out`: there is no folder {str(options.out.parent)!r}")
    try:
        text = configuration(
            model=options.model,
            task=options.task,
            gpus=gpus,
            lora=options.lora,
            data=options.data or DATA,
            path=str(options.out),
        )
    except SettingError as error:
        parser.error(str(error))
    options.out.write_text(text, encoding="utf-8")
    assumed = f" It takes its prompts from {DATA}, since there is no `--data`."
    print(  # noqa: T201
        f"{options.out} is written.{assumed if options.task == 'file' and options.data is None else ''} Read it, then: "
        f"drpo fit --config {options.out}"
    )
