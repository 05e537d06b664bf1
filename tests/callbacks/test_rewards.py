"""Rewards as callbacks: their names, functions by import path, and what the functions are given."""

import pytest

from drpo_lightning.callbacks import ExactMatchReward, FunctionReward, NumericAnswerReward, RewardCallback
from drpo_lightning.rewards import RewardBatch, score_rewards
from drpo_lightning.rewards.base import RewardError

BATCH = RewardBatch(
    prompts=["1+1=", "1+1="],
    completions=["2", "so: 2"],
    completion_ids=[[4, 1], [5, 6, 4, 1]],
    finish_reasons=["stop", "length"],
    columns={"answer": ["2", "2"], "solution": ["2.0", "2.0"]},
)


class BrevityReward(RewardCallback):
    def score(self, batch):
        return [1.0 if len(text) < 2 else 0.0 for text in batch.completions]


class Brevity(BrevityReward):
    pass


class Reward(BrevityReward):
    pass


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Writes a module that can be imported."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)

    return write


def test_a_subclass_needs_only_score():
    assert Brevity().score(BATCH) == [1.0, 0.0]
    assert Brevity().weight == 1.0


@pytest.mark.parametrize(("kind", "name"), [(BrevityReward, "brevity"), (Brevity, "brevity"), (Reward, "reward")])
def test_the_name_is_that_of_the_class(kind, name):
    assert kind().name == name
    assert kind(name="other").name == "other"


def test_a_subclass_without_score_cannot_be_made():
    class Nothing(RewardCallback):
        pass

    with pytest.raises(TypeError, match="score"):
        Nothing()


def test_two_rewards_of_one_class_keep_their_states_apart():
    first, second = FunctionReward(len, name="a"), FunctionReward(len, name="b")
    assert first.state_key != second.state_key


def test_two_rewards_of_one_class_run_side_by_side(make_run, make_recorder):
    def zeros(completions, **_):
        return [0.0 for _ in completions]

    def ones(completions, **_):
        return [1.0 for _ in completions]

    recorder = make_recorder()
    rewards = [FunctionReward(zeros), FunctionReward(ones, weight=0.25), Brevity(weight=2.0)]
    make_run(recorder, rewards=rewards).fit()
    (rollout,) = recorder.rollouts
    assert rollout.reward_parts.keys() == {"zeros", "ones", "brevity"}
    brevity = rollout.reward_parts["brevity"]
    assert rollout.rewards.tolist() == (0.25 + 2 * brevity).tolist()


def test_a_function_is_called_with_keywords_as_in_trl():
    seen = {}

    def reward(prompts, completions, answer, **kwargs):
        seen.update(kwargs, answer=answer, prompts=prompts, completions=completions)
        return [0.5, None]

    assert FunctionReward(reward).score(BATCH) == [0.5, None]
    assert seen == {
        "prompts": BATCH.prompts,
        "completions": BATCH.completions,
        "completion_ids": BATCH.completion_ids,
        "finish_reasons": BATCH.finish_reasons,
        **BATCH.columns,
    }


def test_a_function_has_its_own_name():
    def brevity(**_):
        return []

    assert FunctionReward(brevity).name == "brevity"
    assert FunctionReward(brevity, name="other").name == "other"
    assert FunctionReward(brevity, weight=0.5).weight == 0.5


def test_a_function_is_found_by_its_import_path(write_module):
    write_module("my_rewards", "def brevity(completions, **_):\n    return [float(len(c) < 2) for c in completions]\n")
    reward = FunctionReward("my_rewards.brevity")
    assert reward.name == "brevity"
    assert reward.score(BATCH) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("brevity", r"`function` must be an import path such as `my_module\.my_function`, got 'brevity'"),
        ("no_such_module.brevity", r"'no_such_module\.brevity' cannot be imported: No module named 'no_such_module'"),
        ("math.brevity", r"`function` 'math\.brevity' cannot be imported: module 'math' has no attribute 'brevity'"),
        ("math.pi", r"`function` 'math\.pi' is not callable"),
        ("", "must be an import path"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(path, message):
    with pytest.raises(ValueError, match=message):
        FunctionReward(path)


def test_a_relative_path_is_named():
    with pytest.raises(ValueError, match=r"`function` '\.rewards\.brevity' cannot be imported"):
        FunctionReward(".rewards.brevity")


def test_a_fault_in_the_module_itself_is_not_hidden(write_module):
    write_module("broken_rewards", "def brevity(:\n")
    with pytest.raises(SyntaxError):
        FunctionReward("broken_rewards.brevity")


def test_exact_match_compares_with_a_column():
    assert ExactMatchReward().score(BATCH) == [1.0, 0.0]
    assert ExactMatchReward(column="solution").score(BATCH) == [0.0, 0.0]
    assert (ExactMatchReward().name, ExactMatchReward(name="x", weight=3.0).weight) == ("exact_match", 3.0)


def test_numeric_answer_compares_with_a_column():
    assert NumericAnswerReward().score(BATCH) == [1.0, 1.0]
    assert NumericAnswerReward(column="solution").score(BATCH) == [1.0, 1.0]
    assert NumericAnswerReward(boxed=True).score(BATCH) == [0.0, 0.0]
    assert NumericAnswerReward().name == "numeric_answer"


@pytest.mark.parametrize("kind", [ExactMatchReward, NumericAnswerReward])
def test_a_missing_column_names_the_columns_there_are(kind):
    with pytest.raises(RewardError, match=r"no column 'result'; it has \['answer', 'solution'\]"):
        score_rewards([kind(column="result")], BATCH)
