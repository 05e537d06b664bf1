"""The recipes of `configs/` run as they are, on a small model and a few rows, and their rewards know a right answer."""

import re
import shutil
import sys
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

from drpo_lightning import cli
from drpo_lightning.rewards import Reward, RewardBatch, combine_rewards, score_rewards

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem != "quickstart")
TEMPLATE = "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}>"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory, model_folder):
    """The small model with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "chat"
    shutil.copytree(model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def in_place_of_the_hub(monkeypatch, tmp_path):
    """From here `datasets` takes a name on the hub for a folder; its cache is kept out of the home folder."""
    monkeypatch.chdir(ROOT / "tests" / "data")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def settings(recipe, chat_model, folder):
    """A recipe as it is, apart from its size and the machine."""
    if recipe == "reasoning_gym":
        pytest.importorskip("reasoning_gym")
    return [
        f"--config={ROOT}/configs/{recipe}.yaml",
        f"--model.model={chat_model}",
        "--data.engine=drpo_lightning.rollout.TransformersEngine",
        "--data.num_prompts=4",
        "--data.group_size=4",
        "--data.sampling.max_tokens=4",
        *(["--data.val_sampling.max_tokens=4"] if recipe == "gsm8k" else []),
        "--trainer.accelerator=cpu",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.max_epochs=1",
        "--trainer.num_sanity_val_steps=0",
        f"--trainer.default_root_dir={folder}",
        f"--trainer.logger.init_args.save_dir={folder}",
    ]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs(recipe, chat_model, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["drpo", "fit", *settings(recipe, chat_model, tmp_path)])
    cli.main()
    assert "4 updates on 1 rollouts" in capsys.readouterr().out
    assert (tmp_path / recipe / "version_0" / "policy" / "model.safetensors").is_file()


@pytest.fixture
def build(chat_model, tmp_path, monkeypatch):
    """Builds a recipe without running it."""

    def make(recipe):
        monkeypatch.setattr(sys, "argv", ["drpo"])
        return cli.DRPOCommandLine(
            cli.PolicyModule,
            cli.RolloutDataModule,
            args=settings(recipe, chat_model, tmp_path),
            run=False,
            save_config_callback=None,
            **cli.COMMAND_LINE,
        )

    return make


def boxed(answer):
    return rf"3 steps later it is \boxed{{{answer}}}."


ANSWERS = {
    "gsm8k": lambda row: boxed(re.search(r"#### (.*)", row["answer"])[1]),
    "qwen3_math": lambda row: boxed(row["answer"]),
    "reasoning_gym": lambda row: f"3 steps. <answer>{row['answer']}</answer>",
    "smollm2_arithmetic": lambda row: f"The sum is {row['answer']}.",
}
"""A right completion, as the prompt asks for it."""
ASKED_FOR = {
    "gsm8k": r"\boxed{}.",
    "qwen3_math": r"\boxed{}.",
    "reasoning_gym": "between <answer> and </answer>",
    "smollm2_arithmetic": "Answer with the number only.",
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_rewards_of_a_recipe_know_a_right_answer_to_prompts_that_training_and_validation_do_not_share(
    recipe, build
):
    built = build(recipe)
    data, rewards = built.datamodule, [r for r in built.trainer.callbacks if isinstance(r, Reward)]
    train, validation = data.prompts.load(), data.val_prompts.load()
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in validation}
    for rows in (train[:200], validation[:200]):
        right = [ANSWERS[recipe](row) for row in rows]
        assert scores(rewards, rows, right) == [1.0] * len(rows)
        assert max(scores(rewards, rows, ["7777777."] * len(rows))) < 1
        assert all(ASKED_FOR[recipe] in row["prompt"] for row in data.encoder.encode(rows, key="prompts"))


def scores(rewards, rows, completions):
    """What the rewards of a recipe add up to."""
    columns = {name: [row.get(name) for row in rows] for name in set().union(*rows)}
    count = len(rows)
    batch = RewardBatch([row["prompt"] for row in rows], completions, [[1]] * count, ["stop"] * count, columns)
    parts = score_rewards(rewards, batch)
    return combine_rewards(parts.parts, {reward.name: reward.weight for reward in rewards}, parts.dropped).tolist()


def test_both_aime_sets_are_validated_by_name(build):
    rows = build("qwen3_math").datamodule.val_prompts.load()
    assert [row["data_set"] for row in rows] == ["aime_2024"] * 2 + ["aime_2025"] * 2
