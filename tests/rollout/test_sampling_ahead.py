"""Requests in flight in a real vLLM while weights are loaded: every token's logprob is what it was drawn by."""

import time
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from drpo_lightning.batch import Sampling
from drpo_lightning.errors import SettingError
from drpo_lightning.rollout import NodeEngine, TransformersEngine, VLLMEngine
from drpo_lightning.rollout.engine import Request
from drpo_lightning.rollout.in_process_vllm import InProcessVLLM
from tests.rollout.conftest import start
from tests.rollout.test_engines import PROMPTS, TOLERANCE, generate, trainer_logprobs

LONG = [*range(5, 25)] * 7
"""A prompt longer than a block of the prefix cache."""
SAMPLING = Sampling(max_tokens=24, temperature=2.0)
NUM_STEPS = 10


class Stepwise(InProcessVLLM):
    """Computes as many tokens in the background as it is told to."""

    steps_left = 0
    num_ahead = 0

    def allow(self, steps):
        self.steps_left = steps

    def work(self):
        self.steps_left -= 1
        return self.steps_left >= 0 and super().work()


class StepwiseAsynchronous(Stepwise):
    """A step is begun before the one before it is over, as on a GPU; vLLM does not on a CPU."""

    num_ahead = 2

    def __init__(self, *args):
        from vllm.platforms import current_platform

        as_on_a_cpu = current_platform.check_and_update_config

        def as_on_a_gpu(_, vllm_config):
            as_on_a_cpu(vllm_config)
            vllm_config.scheduler_config.async_scheduling = True

        with patch.object(type(current_platform), "check_and_update_config", as_on_a_gpu):
            super().__init__(*args)
        core = self._llm.llm_engine.engine_core.engine_core
        assert core.async_scheduling
        assert core.batch_queue is not None


@pytest.fixture(scope="module", params=[Stepwise, StepwiseAsynchronous])
def stepwise_engine(request):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("drpo_lightning.rollout.vllm.InProcessVLLM", request.param)
        engine = start(VLLMEngine(dtype="float32", enforce_eager=True, process="own"))
    engine.num_ahead = request.param.num_ahead
    yield engine
    engine.close()


def request(number, prompt, **changes):
    return Request(number, prompt, SAMPLING, num_samples=4, stop_token_ids=[], seed=number)._replace(**changes)


def load(engine, policy, version):
    engine.weights_version = version
    engine.load_weights(policy.state_dict().items())


def advance(engine, steps):
    """Lets requests in flight go on by as many tokens, while nobody calls the engine."""
    heartbeat = engine._remote._heartbeat
    end = heartbeat.count + steps
    engine._call("allow", 60, steps)
    while heartbeat.count < end:
        time.sleep(0.001)


def submit_and_switch(engine, policy, perturbed, in_flight):
    """Completions of requests that were some tokens long when the weights were replaced, of one that was complete, and
    of one that came later."""
    engine.sample_ahead(in_flight)
    load(engine, policy, 3)
    short = request(2, PROMPTS[0], sampling=replace(SAMPLING, max_tokens=NUM_STEPS // 2))
    engine.submit([request(0, PROMPTS[0]), request(1, LONG), short])
    advance(engine, NUM_STEPS)
    load(engine, perturbed, 4)
    engine.submit([request(3, LONG)])
    return engine.collect([0, 1, 2, 3])


def worst(policy, prompt, completions, tokens):
    """Largest difference of a recorded logprob of some tokens from that of a forward pass, in nats."""
    differences = [
        (torch.tensor(completion.logprobs) - trainer_logprobs(policy, prompt, completion, SAMPLING))[tokens]
        for completion in completions
    ]
    return float(torch.cat(differences).abs().max())


def test_requests_that_continue_are_drawn_from_the_old_weights_before_and_from_the_new_after(
    stepwise_engine, policy, perturbed
):
    groups = submit_and_switch(stepwise_engine, policy, perturbed, "continue")
    for number, prompt in enumerate((PROMPTS[0], LONG)):
        # What an asynchronous vLLM has not handed over yet is thrown away, and drawn again.
        assert any(
            worst(policy, prompt, groups[number], slice(num_old)) < TOLERANCE
            and worst(perturbed, prompt, groups[number], slice(num_old, None)) < TOLERANCE
            for num_old in range(NUM_STEPS - stepwise_engine.num_ahead, NUM_STEPS + 1)
        )
        assert worst(policy, prompt, groups[number], slice(NUM_STEPS, None)) > 0.1
    assert worst(policy, PROMPTS[0], groups[2], slice(None)) < TOLERANCE
    assert worst(perturbed, LONG, groups[3], slice(None)) < TOLERANCE
    versions = {number: {c.weights_version for c in group} for number, group in groups.items()}
    assert versions == {0: {3}, 1: {3}, 2: {3}, 3: {4}}


def test_requests_that_are_dropped_are_drawn_from_the_new_weights_alone(stepwise_engine, policy, perturbed):
    groups = submit_and_switch(stepwise_engine, policy, perturbed, "drop")
    for number, prompt in ((0, PROMPTS[0]), (1, LONG), (3, LONG)):
        assert [len(completion.token_ids) for completion in groups[number]] == [24] * 4
        assert worst(perturbed, prompt, groups[number], slice(None)) < TOLERANCE
    assert worst(policy, PROMPTS[0], groups[2], slice(None)) < TOLERANCE
    versions = {number: {c.weights_version for c in group} for number, group in groups.items()}
    assert versions == {0: {4}, 1: {4}, 2: {3}, 3: {4}}
    generate(stepwise_engine, SAMPLING)  # nothing is left of the requests that were dropped


def test_what_is_generated_meanwhile_is_what_it_would_be_alone(stepwise_engine, policy, perturbed):
    load(stepwise_engine, perturbed, 0)
    alone = generate(stepwise_engine, SAMPLING)
    load(stepwise_engine, policy, 0)
    stepwise_engine.submit([request(0, LONG), request(1, PROMPTS[1])])
    advance(stepwise_engine, NUM_STEPS)
    load(stepwise_engine, perturbed, 1)
    meanwhile = generate(stepwise_engine, SAMPLING)
    assert [[c.token_ids for c in group] for group in meanwhile] == [[c.token_ids for c in group] for group in alone]
    assert stepwise_engine.collect([1, 0]).keys() == {0, 1}


def test_what_has_finished_is_taken_without_waiting_and_once(stepwise_engine, policy):
    load(stepwise_engine, policy, 0)
    short = request(5, PROMPTS[0], sampling=Sampling(max_tokens=3))
    stepwise_engine.submit([short, request(6, PROMPTS[1])])
    assert stepwise_engine.finished() == {}
    advance(stepwise_engine, 5)
    assert [len(completion.token_ids) for completion in stepwise_engine.finished()[5]] == [3] * 4
    assert stepwise_engine.finished() == {}
    assert stepwise_engine.collect([6]).keys() == {6}


def test_a_completion_does_not_depend_on_who_waits_for_it(stepwise_engine, policy):
    load(stepwise_engine, policy, 0)
    waited_for = generate(stepwise_engine, SAMPLING, prompts=PROMPTS[:1], seeds=[0])
    stepwise_engine.submit([request(0, PROMPTS[0], stop_token_ids=[1])])
    advance(stepwise_engine, 3)
    assert stepwise_engine.collect([0])[0] == waited_for[0]


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (TransformersEngine(), r"`data\.max_staleness` must be 0 with TransformersEngine.*set `data\.engine: .*VLLME"),
        (NodeEngine(VLLMEngine()), r"must be 0 with NodeEngine.*in a process of its own for each rank"),
        (VLLMEngine(process="in_process"), r"must be 0 with `process: in_process`.*set `process: own`"),
        (VLLMEngine(sleep="always"), r"must be 0 with `sleep: always`.*set `sleep: never`"),
    ],
    ids=["transformers", "node", "in_process", "sleep"],
)
def test_engines_that_cannot_sample_ahead_say_what_to_set(engine, message):
    with pytest.raises(SettingError, match=message):
        engine.sample_ahead("continue")
