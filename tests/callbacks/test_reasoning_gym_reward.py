"""The verifiers of reasoning-gym as a reward."""

import inspect
import pickle
import sys
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drpo_lightning.callbacks import ReasoningGymReward
from drpo_lightning.callbacks.reasoning_gym_reward import EVALUATING_TASKS, tagged_text
from drpo_lightning.datamodules import ReasoningGymPrompts
from drpo_lightning.rewards import RewardBatch, RewardError

pytest.importorskip("reasoning_gym")


def problem(task="chain_sum", **settings):
    return ReasoningGymPrompts(task, size=1, **settings).load()[0]


def score(completion, row, **settings):
    batch = RewardBatch([row["prompt"]], [completion], [[1]], ["stop"], {"problem": [row["problem"]]})
    return ReasoningGymReward(**settings).score(batch)[0]


@pytest.mark.parametrize(
    "task", ["chain_sum", "leg_counting", "basic_arithmetic", "syllogism", "word_sorting", "sokoban"]
)
def test_a_right_answer_gets_1_and_none_gets_less(task):
    row = problem(task)
    assert score(f"I think <answer>0</answer>, no: <answer> {row['answer']}\n</answer>.", row) == 1
    assert score(row["answer"], row, tag=None) == 1
    for completion in ("", row["answer"], f"<answer>{row['answer']}", "<answer></answer>", "<answer>nonsense</answer>"):
        assert score(completion, row) < 1


def test_a_verifier_has_the_settings_of_its_task():
    scores = []
    for places in (2, 6):
        config = {"min_num_decimal_places": places, "max_num_decimal_places": places}
        row = problem("decimal_arithmetic", config=config)
        scores.append(score(str(Decimal(row["answer"]) + Decimal("0.0004")), row, tag=None))
    assert scores[0] == 1 > scores[1]


@pytest.mark.parametrize("task", sorted(EVALUATING_TASKS))
def test_a_verifier_that_would_run_the_answer_as_code_must_be_allowed(task):
    row = problem(task)
    with pytest.raises(RewardError, match=f"the verifier of the reasoning-gym task '{task}' runs the policy's answers"):
        score("<answer>1</answer>", row)
    assert 0 <= score("<answer>1</answer>", row, allow_eval=True) <= 1


def test_all_tasks_that_run_answers_are_known():
    from reasoning_gym.factory import DATASETS

    found = {
        name
        for name, (data_set, _) in DATASETS.items()
        if any(
            call in inspect.getsource(sys.modules[data_set.__module__]) for call in ("eval(answer", "parse_expr(answer")
        )
    }
    assert found == EVALUATING_TASKS


@given(st.lists(st.sampled_from(["<answer>", "</answer>", "<think>", "1", " ", "\n"])).map("".join))
def test_an_answer_is_what_the_last_tags_enclose(text):
    start = text.rfind("<answer>")
    end = text.find("</answer>", start)
    expected = text[start + len("<answer>") : end].strip() if start >= 0 and end >= 0 else None
    assert tagged_text(text, "answer") == expected


def test_the_reward_can_be_isolated():
    row = problem()
    batch = RewardBatch(["p"], [f"<answer>{row['answer']}</answer>"], [[1]], ["stop"], {"problem": [row["problem"]]})
    assert pickle.loads(pickle.dumps(ReasoningGymReward())).score(batch) == [1]


def test_a_run_is_rewarded_by_the_verifier(make_run, make_recorder):
    recorder = make_recorder()
    prompts = ReasoningGymPrompts("chain_sum", size=8, config={"max_terms": 2, "max_digits": 1})
    make_run(recorder, rewards=[ReasoningGymReward(tag=None)], data={"prompts": prompts}).fit()
    rollout = recorder.rollouts[0]
    for text, problem_, reward in zip(rollout.texts, rollout.columns["problem"], rollout.rewards.tolist(), strict=True):
        assert (reward == 1) == (text.strip() == problem_["entry"]["answer"])


def test_a_verifier_that_would_run_answers_is_refused_at_the_start():
    row = {"problem": {"task": "countdown", "config": {}, "entry": {}}}
    with pytest.raises(ValueError, match="'countdown' runs the policy's answers as Python code"):
        ReasoningGymReward().check_row(row)
    ReasoningGymReward(allow_eval=True).check_row(row)
