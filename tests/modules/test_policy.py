"""The LightningModule: its loss and its updates do not depend on how an update is split into micro-batches."""

import math
import shutil

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from drpo_lightning.batch import Sampling
from drpo_lightning.datamodules import ArithmeticPrompts, RolloutDataModule
from drpo_lightning.modules import PolicyModule
from drpo_lightning.modules.checks import check_sampling
from drpo_lightning.modules.logprob_backends import TokenLogprobs
from drpo_lightning.modules.reference import ReferencePenalty
from drpo_lightning.objectives import (
    CISPO,
    DPPO,
    DRPO,
    GSPO,
    SAPO,
    SPO,
    ClippedRatio,
    Decoupled,
    DivergencePenalty,
    MaskDRPO,
    Objective,
    TokenTerms,
    TopKDPPO,
    Unregularized,
)

AGGREGATIONS = [
    {"aggregation": "token_mean"},
    {"aggregation": "seq_mean_token_mean"},
    {"aggregation": "seq_mean_token_sum_norm", "horizon": 5},
]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def weights_of(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.module.parameters()])


@pytest.fixture
def logged(monkeypatch):
    """The scalars that runs log, as (step, value) by name."""
    scalars = {}

    def keep(self, metrics, step=None):
        for name, value in metrics.items():
            scalars.setdefault(name, []).append((step, value))

    monkeypatch.setattr(DummyLogger, "log_metrics", keep)
    return scalars


# ---------------------------------------------------------------- one update, however it is split


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda settings: settings["aggregation"])
def test_updates_do_not_depend_on_the_micro_batches(make_run, logged, aggregation):
    weights = []
    for accumulate in (1, 3, 8, 11):  # of 8 samples: the last three are empty
        run = make_run(
            trainer={"accumulate_grad_batches": accumulate, "logger": DummyLogger()},
            module={"optimizer": sgd, "objective": DRPO(0.2)} | aggregation,
        )
        run.fit()
        weights.append(weights_of(run))
    before = weights_of(make_started(make_run))
    assert (weights[0] - before).abs().max() > 1e-3
    for other in weights[1:]:
        torch.testing.assert_close(weights[0], other, rtol=1e-4, atol=1e-5)
    for name in ("optim/loss", "optim/grad_norm"):
        steps, values = zip(*logged[name], strict=True)
        assert steps == (1, 2) * 4
        for i in (0, 1):
            assert values[i::2] == pytest.approx([values[i]] * 4, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("objective", [GSPO(0.3, 0.5), TopKDPPO(4), Decoupled(ClippedRatio())], ids=repr)
def test_what_an_objective_asks_for_is_split_with_the_update(make_run, objective):
    weights = []
    for accumulate in (1, 4, 9):  # of 8 samples: the last is empty
        run = make_run(
            trainer={"accumulate_grad_batches": accumulate},
            module={"optimizer": sgd, "objective": objective, "reference": ReferencePenalty(0.1)},
        )
        run.fit()
        weights.append(weights_of(run))
    for other in weights[1:]:
        torch.testing.assert_close(weights[0], other, rtol=1e-4, atol=1e-5)


def make_started(make_run):
    """A run whose model is loaded and not trained."""
    run = make_run()
    run.module.trainer = run.trainer
    run.module.configure_model()
    return run


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda settings: settings["aggregation"])
def test_an_incomplete_update_has_the_loss_of_its_own_sequences(make_run, make_recorder, logged, aggregation):
    recorder = make_recorder()
    make_run(
        recorder,
        trainer={"accumulate_grad_batches": 4, "limit_train_batches": 6, "logger": DummyLogger()},
        module={"optimizer": sgd, "objective": DRPO(0.2)} | aggregation,
    ).fit()
    losses = [loss_of(recorder.batches[0][i], recorder.outputs[i], aggregation) for i in (slice(0, 4), slice(4, 6))]
    assert [value for _, value in logged["optim/loss"]] == pytest.approx(losses, rel=1e-4, abs=1e-7)


def loss_of(batches, outputs, settings):
    """The loss of an update from its tokens, one sequence at a time."""
    sequences = [
        row[sampled].double()
        for batch, output in zip(batches, outputs, strict=True)
        for row, sampled in zip(output["objective"].loss, batch.completion_mask, strict=True)
    ]
    match settings["aggregation"]:
        case "token_mean":
            return torch.cat(sequences).mean().item()
        case "seq_mean_token_mean":
            return sum(row.mean().item() for row in sequences) / len(sequences)
        case _:
            return sum(row.sum().item() for row in sequences) / settings["horizon"] / len(sequences)


def test_the_gradient_norm_is_that_of_the_update_before_clipping(make_run, make_recorder, logged):
    changes, before = [], [None]

    def watch(trainer, pl_module, batch_idx):
        now = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        if batch_idx % 2 == 1:
            changes.append(float((now - before[0]).norm()))
        before[0] = now.clone()

    learning_rate, clip = 0.1, 1e-3
    make_run(
        make_recorder(watch),
        trainer={"accumulate_grad_batches": 2, "gradient_clip_val": clip, "logger": DummyLogger()},
        module={"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=learning_rate)},
        data={"num_updates": 4},
    ).fit()
    norms = [value for _, value in logged["optim/grad_norm"]]
    assert len(norms) == 4
    assert min(norms) > 10 * clip
    assert changes == pytest.approx([learning_rate * clip] * 4, rel=1e-2)


def test_without_clipping_the_step_is_the_gradient_norm(make_run, make_recorder, logged):
    states = []
    run = make_run(
        make_recorder(lambda trainer, pl_module, batch_idx: states.append(weights_of(run).clone())),
        trainer={"logger": DummyLogger()},
        module={"optimizer": sgd},
    )
    run.fit()
    (_, _), (_, norm) = logged["optim/grad_norm"]
    assert 0.1 * norm == pytest.approx(float((states[1] - states[0]).norm()), rel=1e-3)


def test_the_first_update_follows_the_plain_policy_gradient(make_run, make_recorder):
    """At pi = mu every objective has the gradient of r A, but for two penalties.

    That of kl has a slope there, and that of tv takes the sign of what rounding leaves of r - 1.
    """
    weights = []
    for objective in (
        Unregularized(),
        DRPO(0.2),
        DRPO(0.2, scale_by_advantage=False),
        MaskDRPO(),
        SPO(),
        DPPO(),
        TopKDPPO(4),
        ClippedRatio(),
        CISPO(),
        GSPO(),
        SAPO(),
        DivergencePenalty("k3"),
        Decoupled(DRPO(0.2)),
        Decoupled(GSPO()),
    ):
        run = make_run(module={"objective": objective, "optimizer": sgd}, data={"num_updates": 1})
        run.fit()
        weights.append(weights_of(run))
    for other in weights[1:]:
        torch.testing.assert_close(weights[0], other, rtol=1e-4, atol=1e-5)


def test_the_policy_learns_what_is_rewarded(make_run, make_recorder):
    from drpo_lightning.callbacks import FunctionReward

    def brevity(completion_ids, **_):
        return [-float(len(ids)) for ids in completion_ids]

    recorder = make_recorder()
    make_run(
        recorder,
        rewards=[FunctionReward(brevity)],
        trainer={"max_epochs": 12, "gradient_clip_val": 1.0},
        module={"objective": DRPO(0.2), "optimizer": lambda p: torch.optim.AdamW(p, lr=2e-3)},
        data={"num_prompts": 8, "group_size": 8},
    ).fit()
    lengths = [-float(rollout.rewards.mean()) for rollout in recorder.rollouts]
    assert lengths[-1] < lengths[0] - 0.5


# ---------------------------------------------------------------- what an objective asks for


class Witness(Objective):
    """The plain policy gradient, which keeps what it is given."""

    required_inputs = frozenset({"sequence_ids", "proximal_logprobs", "topk"})
    num_topk = 5

    def __init__(self):
        self.seen = []

    def terms(self, tokens):
        self.seen.append(tokens)
        objective = tokens.policy_logprobs * tokens.advantages
        return TokenTerms(objective, tokens.advantages)

    def describe(self):
        return "Witness"


def test_an_objective_gets_what_it_asks_for_aligned_with_its_tokens(make_run, make_recorder):
    recorder, witness = make_recorder(), Witness()
    run = make_run(recorder, module={"objective": witness})
    run.fit()
    (rollout,), (batches,) = recorder.rollouts, recorder.batches
    tokens, batch = witness.seen[0], batches[0]
    mask = batch.completion_mask
    assert torch.equal(tokens.completion_mask, mask)
    # before the first update pi, pi_prox and mu are the same policy
    for same in (tokens.proximal_logprobs, tokens.rollout_logprobs):
        torch.testing.assert_close(tokens.policy_logprobs.detach()[mask], same[mask], rtol=0, atol=1e-4)
    torch.testing.assert_close(tokens.topk.policy_logprobs[mask], tokens.topk.rollout_logprobs[mask], rtol=0, atol=1e-4)
    assert tokens.topk.policy_logprobs.shape == (*mask.shape, 5)
    assert not tokens.topk.policy_logprobs.requires_grad
    assert 0 < tokens.topk.holds_sampled.sum() < mask.sum()
    for i, row in enumerate(batch.sample_ids.tolist()):
        own, completion = mask[i], rollout.completions[row]
        assert completion.token_ids == batch.input_ids[i][own].tolist()
        assert torch.equal(tokens.topk.rollout_logprobs[i][own], completion.topk_logprobs)
        assert tokens.proximal_logprobs[i][own].tolist() == pytest.approx(rollout.proximal_logprobs[row])
        held = [token in ids for token, ids in zip(completion.token_ids, completion.topk_ids.tolist(), strict=True)]
        assert tokens.topk.holds_sampled[i][own].tolist() == held
    rows = torch.arange(len(mask))[:, None].expand_as(mask)
    assert torch.equal(tokens.sequence_ids[mask], rows[mask])


def test_at_the_second_update_pi_prox_and_mu_are_still_those_of_the_rollout(make_run):
    witness = Witness()
    make_run(module={"objective": witness, "optimizer": sgd}).fit()
    later = witness.seen[1]
    mask = later.completion_mask
    torch.testing.assert_close(later.proximal_logprobs[mask], later.rollout_logprobs[mask], rtol=0, atol=1e-4)
    assert (later.policy_logprobs - later.proximal_logprobs)[mask].abs().max() > 1e-2
    first = later.topk.rollout_logprobs.argmax(-1, keepdim=True)
    moved = (later.topk.policy_logprobs - later.topk.rollout_logprobs).gather(-1, first)[..., 0]
    assert moved[mask].abs().max() > 1e-3
    assert (later.topk.policy_logprobs.exp().sum(-1)[mask] <= 1 + 1e-5).all()


def test_the_module_says_what_its_objective_asks_for(model_folder):
    for objective, num_topk, proximal in (
        (DRPO(), 0, False),
        (TopKDPPO(7), 7, False),
        (Decoupled(ClippedRatio()), 0, True),
    ):
        module = PolicyModule(model_folder, objective=objective)
        assert (module.num_topk, module.needs_proximal_logprobs) == (num_topk, proximal)


@pytest.mark.parametrize("objective", [DRPO(), TopKDPPO(4)], ids=["plain", "with the top K"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_are_the_logprobs_of_the_forward_pass_whatever_the_batch_size(
    make_run, make_recorder, objective, batch_size
):
    recorder = make_recorder()
    run = make_run(recorder, module={"objective": objective, "optimizer": sgd})
    run.fit()
    (rollout,) = recorder.rollouts
    scores = run.module.score(rollout, batch_size=batch_size, pad_token_id=0)
    assert [len(row) for row in scores] == [len(completion.token_ids) for completion in rollout.completions]
    logits_of = run.module.network.language_model
    for row, prompt, completion in zip(scores, rollout.prompt_ids, rollout.completions, strict=True):
        with torch.no_grad():
            logits = logits_of(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1] / 1.5
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row), expected, rtol=0, atol=1e-5)
    different = torch.tensor(scores[0]) - torch.tensor(rollout.completions[0].logprobs)
    assert different.abs().max() > 1e-3, "the weights of now, not those of the rollout"


def test_scores_need_no_gradient_and_leave_none(make_run, make_recorder):
    recorder = make_recorder()
    run = make_run(recorder, trainer={"precision": "bf16-mixed"})
    run.fit()
    for parameter in run.module.parameters():
        parameter.grad = None
    needed = []
    run.module.network.register_forward_hook(lambda module, inputs, logprobs: needed.append(logprobs.requires_grad))
    run.module.score(recorder.rollouts[0], batch_size=4, pad_token_id=0)
    assert needed == [False] * 4
    assert all(parameter.grad is None for parameter in run.module.parameters())


# ---------------------------------------------------------------- logs, optimizer, schedule


@pytest.mark.parametrize(("log_every_n_steps", "steps"), [(1, [1, 2, 3, 4]), (2, [2, 4])])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_update_is_logged_once(make_run, logged, log_every_n_steps, steps, accumulate):
    make_run(
        trainer={
            "max_epochs": 2,
            "accumulate_grad_batches": accumulate,
            "log_every_n_steps": log_every_n_steps,
            "logger": DummyLogger(),
        },
    ).fit()
    for name in ("optim/loss", "optim/grad_norm", "optim/learning_rate"):
        assert [step for step, _ in logged[name]] == steps
        assert all(math.isfinite(value) for _, value in logged[name])


def test_a_resumed_run_logs_whole_updates_only(make_run, make_recorder, logged, tmp_path):
    def save(trainer, pl_module, batch_idx):
        if (trainer.current_epoch, batch_idx) == (0, 3):
            trainer.save_checkpoint(tmp_path / "run.ckpt")

    settings = {"max_epochs": 2, "accumulate_grad_batches": 2, "logger": DummyLogger()}
    make_run(make_recorder(save), trainer=settings).fit()
    whole = dict(logged["optim/loss"])
    logged.clear()
    make_run(trainer=settings).fit(ckpt_path=tmp_path / "run.ckpt")
    assert logged["optim/loss"] == [(3, whole[3]), (4, whole[4])]


def test_the_schedule_advances_with_every_update(make_run, logged):
    make_run(
        trainer={"max_epochs": 2, "accumulate_grad_batches": 2, "logger": DummyLogger()},
        module={
            "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1.0),
            "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        },
    ).fit()
    assert len({value for _, value in logged["optim/learning_rate"]}) == 4
    ratios = [
        b / a for (_, a), (_, b) in zip(logged["optim/learning_rate"], logged["optim/learning_rate"][1:], strict=False)
    ]
    assert ratios == [0.5] * 3


def test_the_default_optimizer_is_the_papers(make_run, model_folder):
    module = PolicyModule(model_folder)
    module.trainer = make_run().trainer
    module.configure_model()
    optimizer = module.configure_optimizers()
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-6, 0.01)


def test_validation_is_logged_before_the_first_update(make_run, logged):
    make_run(
        trainer={"logger": DummyLogger(), "num_sanity_val_steps": -1},
        data={"val_prompts": ArithmeticPrompts("validation", max_operand=9, num_validation=20), "val_num_samples": 4},
    ).fit()
    for name in ("val/reward/mean", "val/pass@1", "val/pass@2", "val/pass@4", "val/completions/mean_length"):
        assert [step for step, _ in logged[name]] == [0, 2]


def test_validations_do_not_run_into_each_other(make_run, logged, monkeypatch):
    rollouts = []
    sample = RolloutDataModule.validation_rollout
    monkeypatch.setattr(
        RolloutDataModule, "validation_rollout", lambda self: rollouts.append(sample(self)) or rollouts[-1]
    )
    make_run(
        trainer={"logger": DummyLogger(), "num_sanity_val_steps": -1, "max_epochs": 2},
        module={"optimizer": sgd},
        data={"val_prompts": ArithmeticPrompts("validation", max_operand=9, num_validation=20)},
    ).fit()
    means = [float(rollout.rewards.mean()) for rollout in rollouts]
    assert len(set(means)) > 1
    assert [value for _, value in logged["val/reward/mean"]] == pytest.approx(means)


def test_the_threshold_of_passing_is_a_setting(make_run, logged):
    for threshold in (0.0, 1.1):
        make_run(
            trainer={"logger": DummyLogger()},
            module={"pass_threshold": threshold},
            data={"val_prompts": ArithmeticPrompts("validation", max_operand=9, num_validation=20)},
        ).fit()
    assert {value for _, value in logged["val/pass@1"][:2]} == {1.0}
    assert {value for _, value in logged["val/pass@1"][2:]} == {0.0}


# ---------------------------------------------------------------- model


def test_the_policy_is_loaded_in_float32_and_without_dropout(make_run):
    network = make_started(make_run).module.network
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert not network.language_model.training
    assert network.temperature == 1.5


def test_the_policy_is_loaded_once(make_run):
    module = make_started(make_run).module
    network = module.network
    module.configure_model()
    assert module.network is network


def test_gradient_checkpointing_changes_nothing_but_memory(make_run):
    weights = []
    for checkpointing in (False, True):
        run = make_run(module={"gradient_checkpointing": checkpointing, "optimizer": sgd})
        run.fit()
        weights.append(weights_of(run))
        assert run.module.network.language_model.is_gradient_checkpointing == checkpointing
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_small_chunks_change_nothing(make_run, monkeypatch):
    weights = []
    for num_ids in (32, 5):
        monkeypatch.setattr("drpo_lightning.functional.linear_logprobs.COLUMN_MULTIPLE", num_ids)
        monkeypatch.setattr(PolicyModule, "token_logprobs", TokenLogprobs(chunk_bytes=1))
        run = make_run(module={"optimizer": sgd})
        run.fit()
        weights.append(weights_of(run))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_tied_weights_are_named_twice_and_counted_once(make_run):
    module = make_started(make_run).module
    weights = dict(module.named_weights())
    assert weights["lm_head.weight"].data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
    assert {name: tensor.shape for name, tensor in weights.items()} == module.weight_shapes()
    assert not any(tensor.requires_grad for tensor in weights.values())


def test_a_checkpoint_names_its_model(make_run, make_recorder, model_folder, tmp_path):
    path = tmp_path / "run.ckpt"
    make_run(make_recorder(lambda trainer, *_: trainer.save_checkpoint(path))).fit()
    assert torch.load(path, weights_only=True)["policy"] == {"model": model_folder, "peft": None}


# ---------------------------------------------------------------- settings that cannot work


@pytest.mark.parametrize("model", ["./nowhere", "../nowhere", "~/nowhere", "a/b/c", "/nowhere"])
def test_what_looks_like_a_path_and_is_none_is_refused(model):
    with pytest.raises(ValueError, match="is no folder"):
        PolicyModule(model)


@pytest.mark.parametrize("model", ["gpt2", "Qwen/Qwen3-4B-Base"])
def test_a_name_on_the_hub_is_not_looked_up(model):
    PolicyModule(model)


def test_a_model_in_the_home_folder_is_loaded(make_run, model_folder, monkeypatch, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    make_run(module={"model": "~/model"}, data={"model": "~/model"}).fit()


@pytest.mark.parametrize("horizon", [None, 0, -1])
def test_the_sum_over_tokens_needs_a_horizon(model_folder, horizon):
    with pytest.raises(ValueError, match=rf"`model\.horizon` must be positive .*got {horizon}; the paper takes 8192"):
        PolicyModule(model_folder, aggregation="seq_mean_token_sum_norm", horizon=horizon)


@pytest.mark.parametrize(
    ("sampling", "temperature", "message"),
    [
        (Sampling(temperature=0.7), 1.0, r"`model\.temperature` 1\.0 must equal `data\.sampling\.temperature` 0\.7"),
        (Sampling(top_p=0.9), 1.0, "top_p=0.9, top_k=0 renormalises mu .*DRPO divides by it; set top_p: 1.0"),
        (Sampling(top_k=20), 1.0, "top_p=1.0, top_k=20 renormalises mu"),
    ],
)
def test_samples_of_another_distribution_are_refused(make_run, sampling, temperature, message):
    with pytest.raises(ValueError, match=message):
        check_sampling(sampling, DRPO(), temperature)
    run = make_run(module={"temperature": temperature}, data={"sampling": sampling})
    with pytest.raises(ValueError, match=message):
        run.fit()
    assert run.module.network is None


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_greedy_policy_is_refused_in_training_and_validation(make_run, stage):
    run = make_run(
        module={"temperature": 0.0},
        data={"sampling": Sampling(temperature=0.0), "val_prompts": ArithmeticPrompts("validation")},
    )
    with pytest.raises(ValueError, match=r"`data\.sampling\.temperature` must be positive.*set `data\.val_sampling`"):
        getattr(run.trainer, stage)(run.module, run.data)


class NoRatio(Objective):
    uses_importance_ratio = False
    required_inputs = frozenset({"reference_logprobs"})

    def terms(self, tokens):
        raise NotImplementedError

    def describe(self):
        return "NoRatio"


def test_an_objective_that_needs_more_is_refused_at_once(model_folder):
    with pytest.raises(ValueError, match=r"NoRatio needs \['reference_logprobs'\], which the caller does not provide"):
        PolicyModule(model_folder, objective=NoRatio())


# ---------------------------------------------------------------- precision


def small_steps(parameters):
    return torch.optim.AdamW(parameters, lr=1e-6)


def test_a_run_in_bfloat16_loses_its_small_steps_and_warns(make_run):
    run = make_run(trainer={"precision": "bf16-true"}, module={"optimizer": small_steps})
    before = weights_of(make_started(make_run)).bfloat16()
    with pytest.warns(UserWarning, match=r"lr 1e-06 is too small for parameters in bfloat16: .* 32-true or bf16-mixed"):
        run.fit()
    assert run.trainer.global_step == 2
    assert (weights_of(run) != before).float().mean() < 0.05  # float32 parameters: more than 0.9, see below


@pytest.mark.parametrize("objective", [TopKDPPO(5), SAPO(), DRPO(0.2)], ids=lambda objective: type(objective).__name__)
def test_in_bfloat16_the_engines_logprobs_are_not_rounded(make_run, make_recorder, objective):
    recorder = make_recorder()
    settings = {"objective": objective}
    make_run(recorder, trainer={"precision": "bf16-true"}, module=settings).fit()
    for batch in recorder.batches[0]:
        assert {batch.rollout_logprobs.dtype, batch.advantages.dtype} == {torch.float32}
        for i, sample in enumerate(batch.sample_ids.tolist()):
            logprobs = recorder.rollouts[0].completions[sample].logprobs
            assert torch.equal(batch.rollout_logprobs[i][batch.completion_mask[i]], torch.tensor(logprobs))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_float32_parameters_take_small_steps_without_a_warning(make_run, precision):
    run = make_run(trainer={"precision": precision}, module={"optimizer": small_steps})
    before = weights_of(make_started(make_run))
    run.fit()
    assert {parameter.dtype for parameter in run.module.parameters()} == {torch.float32}
    assert (weights_of(run) != before).float().mean() > 0.9
