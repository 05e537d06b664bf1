"""The contract that every engine keeps, on the real engines."""

import pytest
import torch

from drpo_lightning.batch import Sampling
from drpo_lightning.errors import SettingError
from drpo_lightning.functional import sampling_logprobs
from drpo_lightning.rollout import TransformersEngine, VLLMEngine
from tests.rollout.conftest import MODEL

EOS = 1
PROMPTS = [[20, 21, 14, 22, 23, 32], [28, 14, 20, 32], [19, 14, 19, 32]]  # 12+34=, 9+1=, 0+0=
TOLERANCE = 1e-4
"""Of a logprob, in nats. Measured in float32: 5e-6 for transformers and 2e-5 for vLLM at most."""


def generate(engine, sampling, num_samples=4, seeds=(7, 8, 9), prompts=PROMPTS):
    return engine.generate(prompts, sampling, num_samples=num_samples, stop_token_ids=[EOS], seeds=seeds)


@torch.no_grad()
def trainer_logprobs(policy, prompt, completion, sampling):
    """log mu of each token of a completion, by one forward pass over the whole sequence."""
    logits = policy(input_ids=torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
    logprobs = sampling_logprobs(logits, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
    return logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=8),
        Sampling(max_tokens=8, temperature=0.7),
        Sampling(max_tokens=8, temperature=1.3, top_k=5),
        Sampling(max_tokens=8, top_p=0.8),
    ],
    ids=["plain", "cold", "top_k", "top_p"],
)
def test_logprobs_are_those_of_the_distribution_that_was_sampled_from(engine, policy, sampling):
    groups = generate(engine, sampling)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            expected = trainer_logprobs(policy, prompt, completion, sampling)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=TOLERANCE)


def test_every_prompt_gets_its_samples_and_they_differ(engine):
    groups = generate(engine, Sampling(max_tokens=8, temperature=2.0), num_samples=5)
    assert [len(group) for group in groups] == [5, 5, 5]
    for group in groups:
        assert len({tuple(completion.token_ids) for completion in group}) > 1


def test_a_completion_ends_with_its_stop_token_or_is_truncated(engine):
    completions = [c for group in generate(engine, Sampling(max_tokens=2, temperature=1.5), 16) for c in group]
    for completion in completions:
        if completion.is_truncated:
            assert len(completion.token_ids) == 2
            assert EOS not in completion.token_ids
        else:
            assert completion.token_ids.index(EOS) == len(completion.token_ids) - 1
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}


def test_equal_seeds_give_equal_completions(engine):
    first, again = (generate(engine, Sampling(max_tokens=8)) for _ in range(2))
    assert first == again
    assert generate(engine, Sampling(max_tokens=8), seeds=(70, 80, 90)) != first


def test_a_sample_does_not_depend_on_the_other_prompts(engine):
    together = generate(engine, Sampling(max_tokens=8))
    alone = generate(engine, Sampling(max_tokens=8), seeds=(8,), prompts=PROMPTS[1:2])
    assert [c.token_ids for c in alone[0]] == [c.token_ids for c in together[1]]


def test_without_seeds_every_call_draws_anew(engine):
    first, second = (generate(engine, Sampling(max_tokens=8, temperature=2.0), 8, seeds=None) for _ in range(2))
    assert first != second


def test_frequencies_are_those_that_the_logprobs_say(engine, policy):
    sampling = Sampling(max_tokens=1, temperature=1.5)
    group = generate(engine, sampling, 4000, seeds=(3,), prompts=PROMPTS[:1])[0]
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in group]), minlength=policy.config.vocab_size)
    with torch.no_grad():
        probabilities = policy(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1].div(1.5).softmax(-1)
    likely = probabilities * 4000 > 5
    expected = torch.cat([probabilities[likely], probabilities[~likely].sum()[None]]) * 4000
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]]).float()
    chi_squared = ((observed - expected) ** 2 / expected.clamp(min=1)).sum() / (len(expected) - 1)
    assert chi_squared < 2.5


def test_greedy_takes_the_most_likely_token(engine, policy):
    group = generate(engine, Sampling(max_tokens=1, temperature=0.0), 1)[0]
    with torch.no_grad():
        assert group[0].token_ids == [int(policy(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1].argmax())]


def test_the_trainers_random_numbers_are_left_alone(engine):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    generate(engine, Sampling(max_tokens=4))
    assert torch.equal(torch.rand(3), expected)


def test_a_started_engine_knows_its_context_and_precision(engine):
    assert engine.is_started
    assert engine.context_tokens == 512
    assert engine.dtype_name == "float32"


def test_sleep_is_an_error_on_a_cpu_unless_auto(engine):
    engine.sleep()
    engine.wake()
    for kind in (VLLMEngine, TransformersEngine):
        with pytest.raises(SettingError, match=r"`sleep: always` is not supported by .*; set `sleep: auto`"):
            kind(sleep="always").start(MODEL, device=torch.device("cpu"), num_ranks=1, seed=0)


def test_in_process_vllm_is_refused_on_several_ranks():
    with pytest.raises(SettingError, match="`process: in_process` works on one rank only, got 2"):
        VLLMEngine(process="in_process").start(MODEL, device=torch.device("cpu"), num_ranks=2, seed=0)


def test_without_vllm_the_error_names_the_ways_out(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"vLLM is not installed.*TransformersEngine"):
        VLLMEngine().check_available()


def test_closing_is_possible_at_any_time():
    for engine in (VLLMEngine(), TransformersEngine()):
        engine.close()
        engine.close()
        assert not engine.is_started
