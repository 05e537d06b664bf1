"""A number that breaks on one rank of two: both leave the same updates out, and both stop, never one alone."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from drpo_lightning.batch import Sampling
from drpo_lightning.rollout import EngineError, VLLMEngine
from drpo_lightning.rollout.in_process_vllm import InProcessVLLM
from tests.distributed.training import NUM_RANKS
from tests.planted import same_tensors
from tests.reliability.ranks_of_numbers import NUM_UPDATES, Case
from tests.rollout.conftest import start

pytestmark = pytest.mark.reliability
ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 400
STRATEGIES = ("ddp", "fsdp2", "fsdp1")
QUANTITIES = ("policy_logprobs", "objective_loss", "gradient")
CASES = [
    *(Case(strategy, quantity) for strategy in STRATEGIES for quantity in (None, *QUANTITIES)),
    *(Case(strategy, "policy_logprobs", updates=(2, 3, 4)) for strategy in STRATEGIES),
    Case("ddp", lie=True),
    Case("fsdp2", lie=True),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each rank has to say, a list by case; one pair of processes runs all cases."""
    folder = tmp_path_factory.mktemp("numbers")
    (folder / "cases.pickle").write_bytes(pickle.dumps(CASES))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = []
    try:
        for rank in range(NUM_RANKS):
            command = [sys.executable, "-m", "tests.reliability.ranks_of_numbers", str(rank), str(folder)]
            with (folder / f"rank{rank}.txt").open("w") as output:
                ranks.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
                )
        for rank, process in enumerate(ranks):
            status = process.wait(timeout=LIMIT_SECONDS)
            assert status == 0, (folder / f"rank{rank}.txt").read_text()[-5000:]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    of_ranks = [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(NUM_RANKS)]
    return {case: [of_rank[case] for of_rank in of_ranks] for case in CASES}


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_both_ranks_leave_the_same_update_out_and_go_on_as_if_it_had_not_been(answers, strategy, quantity):
    references = answers[Case(strategy, None)]
    for answer, reference in zip(answers[Case(strategy, quantity)], references, strict=True):
        assert answer.error is reference.error is None
        states = answer.states
        assert list(states) == list(range(1, NUM_UPDATES + 1))
        assert same_tensors(states[3], states[2])
        assert not same_tensors(states[4], states[3])
        assert all(same_tensors(states[step], reference.states[step]) for step in states)


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_sample_is_written_down_by_the_rank_that_has_it(answers, strategy, quantity):
    first, second = answers[Case(strategy, quantity)]
    assert first.skipped == [0, 0, 1, 1, 1, 1]
    (warning,) = [message for message in first.warnings if "left out" in message]
    if quantity == "gradient":  # it is nobody's: each rank writes down what it has
        assert "update 3 has NaN or infinite gradient, in no sample of its own" in warning
        assert len(first.files["update_000003.rank0.jsonl"].splitlines()) == 4
        assert len(second.files["update_000003.rank1.jsonl"].splitlines()) == 4
        return
    assert not first.files
    (record,) = map(json.loads, second.files["update_000003.rank1.jsonl"].splitlines())
    assert record["sample_id"] == second.samples[3]
    assert record["not_finite_at"][quantity] == [0]
    assert f"samples [{second.samples[3]}] of rank 1; see" in warning


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_both_ranks_stop_after_so_many_in_succession(answers, strategy):
    first, second = answers[Case(strategy, "policy_logprobs", updates=(2, 3, 4))]
    assert first.error == second.error
    name, message = first.error
    assert name == "NonFiniteError"
    assert message.startswith("update 4 has NaN or infinite policy_logprobs (1 tokens)")
    for answer in (first, second):
        assert list(answer.states) == [1, 2, 3]
        assert same_tensors(answer.states[3], answer.states[1])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_an_engine_that_lies_to_one_rank_ends_both(answers, strategy):
    first, second = answers[Case(strategy, lie=True)]
    assert first.error == ("EngineError", "the engine of another rank has failed; that rank's output says why")
    name, message = second.error
    assert name == "EngineError"
    assert "sample 7 (of prompt 1) has logprob 0.693, which a sampled token cannot have" in message
    assert list(first.states) == list(second.states) == [1, 2]


class SwapsPrompts(InProcessVLLM):
    """vLLM that answers the last request first."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        step = self._llm.llm_engine.step

        def swapping_step():
            outputs = step()
            for output in outputs:
                output.request_id = str(2 - int(output.request_id))
            return outputs

        self._llm.llm_engine.step = swapping_step


def test_completions_of_other_prompts_are_caught(monkeypatch):
    monkeypatch.setattr("drpo_lightning.rollout.vllm.InProcessVLLM", SwapsPrompts)
    engine = start(VLLMEngine(process="own", dtype="float32", enforce_eager=True))
    try:
        swapped = r"prompt of request (0, .* \[21, 5\], but one .* \[21, 7\]|2, .* \[21, 7\], but one .* \[21, 5\])"
        with pytest.raises(EngineError, match=swapped):
            engine.generate([[21, 5], [21, 6], [21, 7]], Sampling(max_tokens=2), num_samples=2, stop_token_ids=[1])
    finally:
        engine.close()
