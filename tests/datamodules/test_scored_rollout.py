from transformers import AutoTokenizer

from drpo_lightning.callbacks import ExactMatchReward, FunctionReward
from drpo_lightning.datamodules.scored_rollout import column_names, scored_rollout


def fails(completions, **_):
    raise AssertionError("rewards are not asked about nothing")


def test_a_rank_without_prompts_has_a_rollout_of_none(model_folder):
    rows = [{"prompt": "1+1=", "prompt_ids": [3], "answer": "2"}, {"prompt": "1+2=", "prompt_ids": [4]}]
    rollout = scored_rollout(
        [],
        [],
        [],
        columns=column_names(rows),
        num_samples=2,
        tokenizer=AutoTokenizer.from_pretrained(model_folder),
        rewards=[ExactMatchReward(), FunctionReward(fails, name="fails")],
    )
    assert len(rollout) == 0
    assert rollout.texts == []
    assert rollout.columns == {"answer": []}
    assert rollout.rewards.shape == (0,)
    assert {name: part.shape for name, part in rollout.reward_parts.items()} == {"exact_match": (0,), "fails": (0,)}
