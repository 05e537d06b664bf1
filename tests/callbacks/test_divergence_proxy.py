"""Binary, top-K and exact divergence side by side."""

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drpo_lightning.callbacks.divergence_proxy import NAMES, DivergenceProxy, FullSamples, divergences

VOCABULARY = 12


def random_samples(seed, tokens=200):
    """A batch of one row, all of it sampled, with mu of the whole vocabulary; and pi in float64."""
    generator = torch.Generator().manual_seed(seed)
    mu = (3 * torch.randn(tokens, VOCABULARY, generator=generator, dtype=torch.float64)).softmax(1)
    pi = (mu.log() + 0.5 * torch.randn(mu.shape, generator=generator, dtype=torch.float64)).softmax(1)
    sampled = torch.multinomial(mu, 1, generator=generator)
    ordered, ids = mu.sort(1, descending=True)
    everywhere = torch.ones(1, tokens, dtype=torch.bool)
    samples = FullSamples(
        input_ids=sampled.T,
        attention_mask=everywhere,
        completion_mask=everywhere,
        rollout_logprobs=mu.gather(1, sampled).log().float().T,
        vocabulary_ids=ids,
        vocabulary_logprobs=ordered.log().float(),
    )
    asked = torch.cat([pi.gather(1, sampled), pi.gather(1, ids)], 1)
    return samples, asked.log().float(), pi, mu


def test_exact_is_the_divergence_over_the_whole_vocabulary():
    samples, policy_logprobs, pi, mu = random_samples(0)
    values = divergences(policy_logprobs, samples, k=3)
    torch.testing.assert_close(values["proxy/exact_tv"].double(), (pi - mu).abs().sum(1) / 2, rtol=1e-4, atol=1e-6)
    expected = (mu * (mu.log() - pi.log())).sum(1)
    torch.testing.assert_close(values["proxy/exact_kl"].double(), expected, rtol=1e-3, atol=1e-5)


def test_binary_sees_the_sampled_token_and_top_k_the_k_most_likely_and_it():
    samples, policy_logprobs, pi, mu = random_samples(1)
    values = divergences(policy_logprobs, samples, k=3)
    for i, token in enumerate(samples.input_ids[0].tolist()):
        named = sorted({token, *mu[i].topk(3).indices.tolist()})
        shift = (pi[i] - mu[i])[named]
        expected = (shift.abs().sum() + shift.sum().abs()) / 2
        assert values["proxy/topk_tv"][i].item() == pytest.approx(expected.item(), abs=1e-5)
        assert values["proxy/binary_tv"][i].item() == pytest.approx((pi - mu)[i, token].abs().item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["tv", "kl"])
@pytest.mark.parametrize("k", [1, 3, VOCABULARY])
def test_binary_is_at_most_top_k_and_that_at_most_exact(kind, k):
    samples, policy_logprobs, _, _ = random_samples(2)
    values = divergences(policy_logprobs, samples, k=k)
    binary, topk, exact = (values[f"proxy/{name}_{kind}"] for name in ("binary", "topk", "exact"))
    assert (binary <= topk + 1e-5).all()
    assert (topk <= exact + 1e-5).all()


def logged(folder):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        tag: {event.step: event.value for event in accumulator.Scalars(tag)} for tag in accumulator.Tags()["scalars"]
    }


def test_a_run_logs_all_of_them_after_the_last_update_of_every_nth_rollout(make_run, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    proxy = DivergenceProxy(num_prompts=2, max_tokens=3, k=4, every_n_rollouts=2)
    make_run(proxy, trainer={"max_epochs": 3, "logger": logger, "num_sanity_val_steps": -1}).fit()
    scalars = logged(tmp_path)
    assert {tuple(scalars[name]) for name in NAMES} == {(2, 6)}
    for kind in ("tv", "kl"):
        for step in (2, 6):
            binary, topk, exact = (scalars[f"proxy/{name}_{kind}"][step] for name in ("binary", "topk", "exact"))
            assert 0 < binary <= topk <= exact


def test_without_an_update_the_policy_is_the_engine(make_run, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    still = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
    make_run(DivergenceProxy(num_prompts=2), trainer={"logger": logger}, module=still).fit()
    assert all(value <= 1e-5 for name in NAMES for value in logged(tmp_path)[name].values())


def test_the_rollouts_are_the_same_with_and_without_it(make_run, make_recorder):
    tokens = []
    for callbacks in ([], [DivergenceProxy(num_prompts=2, every_n_rollouts=1)]):
        recorder = make_recorder()
        make_run(recorder, *callbacks, trainer={"max_epochs": 2}).fit()
        tokens.append([[c.token_ids for c in rollout.completions] for rollout in recorder.rollouts])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("name", ["num_prompts", "max_tokens", "k", "every_n_rollouts"])
def test_settings_must_be_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        DivergenceProxy(**{name: 0})
