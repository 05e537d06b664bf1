"""What is logged of an update's tokens: equal to a float64 computation, and the same however the update is split."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drpo_lightning.batch import RolloutBatch
from drpo_lightning.callbacks import Divergence, MaskStatistics, PolicyShift
from drpo_lightning.objectives import DPPO, DRPO, ClippedRatio

KINDS = [PolicyShift, Divergence, MaskStatistics]
HISTOGRAMS = ("histogram/probability_shift", "histogram/log_ratio", "histogram/grad_weight")


def random_batch(seed, shape=(6, 12)):
    """On-policy, near and far tokens, rare and common ones, A of both signs and 0, garbage outside the completions."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(shape, generator=generator)

    kind = uniform(0, 1)
    rollout = torch.where(
        kind < 0.2, uniform(-0.1, -0.01), torch.where(kind < 0.8, uniform(-4, -0.2), uniform(-7, -4.7))
    )
    policy = (rollout + uniform(-1, 1) * uniform(0, 1).round()).clamp(max=-0.01)
    policy = torch.where(uniform(0, 1) < 0.1, rollout - 25, policy)
    advantages = uniform(-1, 1) * (uniform(0, 1) < 0.8)
    mask = uniform(0, 1) < 0.6
    mask[:, 0] = False
    batch = RolloutBatch(
        input_ids=torch.ones(shape, dtype=torch.long),
        attention_mask=torch.ones(shape, dtype=torch.bool),
        completion_mask=mask,
        rollout_logprobs=rollout.where(mask, torch.tensor(0.0)),
        advantages=advantages.where(mask, torch.tensor(0.0)),
        num_update_tokens=1,
        num_update_sequences=1,
        sample_ids=torch.arange(len(mask)),
    )
    return batch, policy.where(mask, torch.tensor(math.nan))


def outputs_of(objective, batch, policy):
    output = objective(policy, batch.rollout_logprobs, batch.advantages, batch.completion_mask)
    return {"loss": torch.tensor(0.0), "policy_logprobs": policy, "objective": output}


def logged(callback, objective, micro_batches, logger):
    """What a callback logs of one update, through its hooks."""
    settings = {"log_every_n_steps": 1, "loggers": [logger], "world_size": 1, "is_global_zero": True}
    trainer = SimpleNamespace(global_step=0, state=SimpleNamespace(fn="fit"), **settings)
    trainer.callback_metrics = {}
    module = SimpleNamespace(device=torch.device("cpu"))
    callback.on_train_start(trainer, module)
    for i, (batch, policy) in enumerate(micro_batches):
        trainer.global_step = int(i == len(micro_batches) - 1)
        callback.on_train_batch_end(trainer, module, outputs_of(objective, batch, policy), batch, i)
    return {name: values[-1][1] for name, values in logger.scalars.items()}


def float64_tokens(micro_batches):
    """log pi, log mu and A of all completion tokens."""
    columns = [
        [x[batch.completion_mask].double().numpy() for batch, x in pairs]
        for pairs in (
            [(batch, policy) for batch, policy in micro_batches],
            [(batch, batch.rollout_logprobs) for batch, _ in micro_batches],
            [(batch, batch.advantages) for batch, _ in micro_batches],
        )
    ]
    return [np.concatenate(column) for column in columns]


def kinds_of(log_mu, advantages):
    """The subsets of tokens by the names that keys end in; each has some."""
    rare, common = np.exp(log_mu) <= 0.01, np.exp(log_mu) >= 0.9
    kinds = {
        "_positive_adv": advantages > 0,
        "_negative_adv": advantages < 0,
        "_rare": rare,
        "_middle": ~rare & ~common,
        "_common": common,
    }
    assert all(chosen.any() for chosen in kinds.values())
    return kinds


@pytest.fixture(params=[1, 3])
def micro_batches(request):
    return [random_batch(seed) for seed in range(request.param)]


def test_policy_shift_equals_a_float64_computation(micro_batches, make_memory):
    log_pi, log_mu, _ = float64_tokens(micro_batches)
    log_ratio = log_pi - log_mu
    clamped = log_ratio.clip(-20, 20)
    ratio, shift = np.exp(clamped), np.exp(log_mu) * np.expm1(clamped)
    assert logged(PolicyShift(), DRPO(0.2), micro_batches, make_memory()) == {
        "policy_shift/abs_mean": pytest.approx(abs(shift).mean(), rel=1e-5),
        "policy_shift/mean": pytest.approx(shift.mean(), rel=1e-5),
        "policy_shift/abs_max": pytest.approx(abs(shift).max(), rel=1e-5),
        "log_ratio/abs_mean": pytest.approx(abs(log_ratio).mean(), rel=1e-5),
        "log_ratio/abs_max": pytest.approx(25, rel=1e-5),
        "log_ratio/beyond_clamp_fraction": pytest.approx((abs(log_ratio) > 20).mean(), rel=1e-5),
        "importance_ratio/mean": pytest.approx(ratio.mean(), rel=1e-5),
        "importance_ratio/max": pytest.approx(ratio.max(), rel=1e-5),
        "policy_shift/abs_p99": pytest.approx(np.quantile(abs(shift), 0.99, method="inverted_cdf"), rel=0.024),
        "policy_shift/beyond_0.05_fraction": pytest.approx((abs(shift) > 0.05).mean()),
        "policy_shift/beyond_0.1_fraction": pytest.approx((abs(shift) > 0.1).mean()),
        "policy_shift/beyond_0.2_fraction": pytest.approx((abs(shift) > 0.2).mean()),
        "policy_shift/beyond_0.5_fraction": pytest.approx((abs(shift) > 0.5).mean()),
        "entropy/rollout": pytest.approx(-log_mu.mean(), rel=1e-5),
    }


def test_divergence_equals_a_float64_computation(micro_batches, make_memory):
    log_pi, log_mu, _ = float64_tokens(micro_batches)
    log_ratio = (log_pi - log_mu).clip(-20, 20)
    pi, mu = np.exp(log_mu + log_ratio), np.exp(log_mu)
    values = {
        "divergence/k1_kl": log_mu - log_pi,
        "divergence/k3_kl": np.exp(log_ratio) - 1 - log_ratio,
        "divergence/binary_tv": abs(pi - mu),
        "divergence/binary_kl": mu * np.log(mu / pi) + (1 - mu) * np.log((1 - mu) / (1 - pi)),
    }
    expected = {name: pytest.approx(value.mean(), rel=1e-4) for name, value in values.items()}
    expected |= {f"{name}_max": pytest.approx(value.max(), rel=1e-4) for name, value in values.items()}
    assert logged(Divergence(), DRPO(0.2), micro_batches, make_memory()) == expected


@pytest.mark.parametrize("delta", [0.2, 12.5])
def test_gradient_weights_equal_a_float64_computation(micro_batches, make_memory, delta):
    log_pi, log_mu, advantages = float64_tokens(micro_batches)
    shift = np.exp(log_pi) - np.exp(log_mu)
    weight = 1 - np.sign(advantages) * shift / delta
    weight[abs(log_pi - log_mu) > 20] = 0.0
    signed = advantages != 0
    # On-policy tokens have w = 1 up to rounding, which counts as neither.
    settled = abs(weight - 1) > 1e-3
    everywhere = np.ones_like(signed)
    values = {
        "grad_weight/mean": (weight, signed),
        "grad_weight/corrective_fraction": (weight < 0, signed),
        "grad_weight/attenuated_fraction": ((weight >= 0) & (weight < 1) & settled, signed),
        "grad_weight/amplified_fraction": ((weight > 1) & settled, signed),
        "region/outside_fraction": ((abs(shift) > 0.2) & (shift * advantages > 0), everywhere),
    }
    kinds = {"": everywhere} | kinds_of(log_mu, advantages)
    expected = {
        name + kind: value[among & chosen].mean()
        for name, (value, among) in values.items()
        for kind, chosen in kinds.items()
    }
    expected |= {f"tokens/{kind}_fraction": kinds[f"_{kind}"].mean() for kind in ("rare", "middle", "common")}
    expected |= {"grad_weight/max": weight[signed].max(), "grad_weight/min": weight[signed].min()}
    found = logged(MaskStatistics(), DRPO(delta), micro_batches, make_memory())
    for q in (1, 10, 50, 90, 99):
        exact = np.quantile(weight[signed], q / 100, method="inverted_cdf")
        assert found.pop(f"grad_weight/p{q:02}") - 1 == pytest.approx(exact - 1, rel=0.024, abs=2e-6)
    assert found == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in expected.items()}


def test_rounding_on_policy_neither_attenuates_nor_amplifies(make_run, make_memory):
    logger = make_memory()
    make_run(MaskStatistics(), trainer={"logger": logger}, module={"objective": DRPO(0.2)}).fit()
    for kind in ("corrective", "attenuated", "amplified"):
        assert logger.values(f"grad_weight/{kind}_fraction")[0] == 0
    assert logger.values("grad_weight/attenuated_fraction")[1] > 0


@pytest.mark.parametrize(("divergence", "threshold"), [("binary_tv", 0.15), ("binary_kl", 0.05)])
def test_mask_fractions_equal_a_float64_computation(micro_batches, make_memory, divergence, threshold):
    log_pi, log_mu, advantages = float64_tokens(micro_batches)
    pi, mu = np.exp(log_pi), np.exp(log_mu)
    kl = mu * np.log(mu / pi) + (1 - mu) * np.log((1 - mu) / (1 - pi))
    distance = abs(pi - mu) if divergence == "binary_tv" else kl
    dropped = (distance > threshold) & (advantages * (pi - mu) > 0)
    assert 0 < dropped.mean() < 1
    found = logged(MaskStatistics(), DPPO(divergence), micro_batches, make_memory())
    assert found["mask/fraction"] == pytest.approx(dropped.mean())
    for kind, chosen in kinds_of(log_mu, advantages).items():
        assert found[f"mask/fraction{kind}"] == pytest.approx(dropped[chosen].mean()), kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_garbage_outside_the_completions_changes_nothing(make_memory, kind, garbage):
    batch, policy = random_batch(0)
    clean = logged(kind(), DPPO(), [(batch, policy)], make_memory())
    for name in ("rollout_logprobs", "advantages"):
        setattr(batch, name, getattr(batch, name).where(batch.completion_mask, torch.tensor(garbage)))
    policy = policy.where(batch.completion_mask, torch.tensor(garbage))
    assert logged(kind(), DPPO(), [(batch, policy)], make_memory()) == clean


def test_the_thresholds_of_rare_and_common_tokens_belong_to_them(make_memory):
    batch, _ = random_batch(0, shape=(1, 5))
    batch.completion_mask = torch.tensor([[False, True, True, True, True]])
    batch.rollout_logprobs = torch.tensor([[0.0, 0.01, 0.0101, 0.899, 0.9]]).log()
    found = logged(MaskStatistics(), DRPO(0.2), [(batch, batch.rollout_logprobs)], make_memory())
    shares = [found[f"tokens/{kind}_fraction"] for kind in ("rare", "middle", "common")]
    assert shares == [0.25, 0.5, 0.25]


def test_a_token_that_was_certain_is_common_and_adds_no_entropy(make_memory):
    batch, _ = random_batch(0, shape=(2, 3))
    batch.rollout_logprobs = torch.zeros(2, 3)
    batch.completion_mask[0, 1] = True
    pair = (batch, batch.rollout_logprobs)
    assert logged(MaskStatistics(), DRPO(0.2), [pair], make_memory())["tokens/common_fraction"] == 1
    assert logged(PolicyShift(), DRPO(0.2), [pair], make_memory())["entropy/rollout"] == 0


@pytest.mark.parametrize(("objective", "has_mask"), [(DRPO(0.2), False), (DPPO(), True), (ClippedRatio(), True)])
def test_only_an_objective_with_a_mask_has_mask_fractions(make_memory, objective, has_mask):
    found = logged(MaskStatistics(), objective, [random_batch(0)], make_memory())
    assert any(name.startswith("mask/") for name in found) == has_mask
    assert "grad_weight/mean" in found


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_without_completion_tokens_logs_nothing(make_memory, kind):
    batch, policy = random_batch(0)
    batch.completion_mask = torch.zeros_like(batch.completion_mask)
    assert logged(kind(), DPPO(), [(batch, policy)], make_memory()) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_updates_do_not_run_into_each_other(make_memory, kind):
    callback = kind()
    logged(callback, DPPO(), [random_batch(1)], make_memory())
    second = logged(callback, DPPO(), [random_batch(2)], make_memory())
    assert second == logged(kind(), DPPO(), [random_batch(2)], make_memory())


@pytest.mark.parametrize("kind", KINDS)
def test_the_interval_is_positive(kind):
    with pytest.raises(ValueError, match="`every_n_updates` must be at least 1, got 0"):
        kind(every_n_updates=0)


def test_bins_and_range_are_settings():
    (edges,) = MaskStatistics(max_weight=2.0, num_bins=4).statistics._edges.values()
    assert edges.tolist() == [-2, -1, 0, 1, 2]
    assert {len(edges) for edges in PolicyShift(num_bins=10).statistics._edges.values()} == {11}


# ---------------------------------------------------------------- in a training


@pytest.mark.parametrize("objective", [DRPO(0.2), DPPO("binary_tv", 0.02)], ids=["drpo", "dppo"])
def test_what_is_logged_does_not_depend_on_the_micro_batches(make_run, make_memory, objective):
    loggers = []
    for accumulate in (1, 4):
        logger = make_memory()
        make_run(
            *(kind() for kind in KINDS),
            trainer={"accumulate_grad_batches": accumulate, "logger": logger},
            module={"objective": objective, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1)},
        ).fit()
        loggers.append(logger)
    whole, split = loggers
    assert whole.scalars.keys() == split.scalars.keys()
    assert max(whole.values("policy_shift/abs_max")) > 0.02
    for name in whole.scalars:
        assert whole.steps(name) == split.steps(name)
        assert whole.values(name) == pytest.approx(split.values(name), rel=1e-3, abs=1e-5), name


def test_the_first_update_of_a_rollout_is_on_policy_and_the_next_is_not(make_run, make_memory):
    logger = make_memory()
    make_run(PolicyShift(), trainer={"logger": logger, "max_epochs": 2}).fit()
    first, second, third, fourth = logger.values("policy_shift/abs_mean")
    assert max(first, third) < 1e-5
    assert min(second, fourth) > 1e-4
    assert logger.steps("policy_shift/abs_mean") == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("every_n_updates", "log_every_n_steps", "steps"),
    [(None, 1, [1, 2, 3, 4, 5, 6, 7, 8]), (None, 3, [3, 6]), (2, 3, [2, 4, 6, 8]), (5, 1, [5]), (9, 1, [])],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_nth_update_is_logged(
    make_run, make_recorder, tmp_path, every_n_updates, log_every_n_steps, steps, accumulate
):
    logger, recorder = TensorBoardLogger(tmp_path, default_hp_metric=False), make_recorder()
    make_run(
        PolicyShift(every_n_updates=every_n_updates),
        recorder,
        trainer={
            "logger": logger,
            "log_every_n_steps": log_every_n_steps,
            "accumulate_grad_batches": accumulate,
            "max_epochs": 2,
        },
        data={"num_updates": 4},
    ).fit()
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "histograms": 0}).Reload()
    tokens = {
        1 + 4 * epoch + i // accumulate: batch.num_update_tokens
        for epoch, batches in enumerate(recorder.batches)
        for i, batch in enumerate(batches)
    }
    if not steps:
        assert "policy_shift/abs_mean" not in events.Tags()["scalars"]
        return
    assert [event.step for event in events.Scalars("policy_shift/abs_mean")] == steps
    histograms = events.Histograms("histogram/log_ratio")
    assert [event.step for event in histograms] == steps
    assert [event.histogram_value.num for event in histograms] == [tokens[step] for step in steps]


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(make_run, make_recorder, make_memory, tmp_path):
    def save(trainer, pl_module, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            trainer.save_checkpoint(tmp_path / "run.ckpt")

    scalars = []
    for recorder, ckpt_path in ((make_recorder(save), None), (make_recorder(), tmp_path / "run.ckpt")):
        logger = make_memory()
        make_run(
            PolicyShift(),
            MaskStatistics(),
            recorder,
            trainer={"logger": logger, "max_epochs": 3, "accumulate_grad_batches": 2},
        ).fit(ckpt_path=ckpt_path)
        scalars.append(logger.scalars)
    for name in [name for name in scalars[0] if not name.startswith(("optim/", "perf/"))]:
        assert scalars[1][name] == [entry for entry in scalars[0][name] if entry[0] > 3]
