"""The reference model: frozen, scored once per rollout, no part of the policy's module, off by default."""

import itertools
import math
import re

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy

from drpo_lightning.batch import Completion, Rollout
from drpo_lightning.callbacks import FunctionReward, RolloutStatistics
from drpo_lightning.errors import SettingError
from drpo_lightning.modules import PolicyModule, PolicyNetwork, ReferencePenalty
from drpo_lightning.modules import reference as reference_module
from drpo_lightning.modules.language_model import load_language_model
from drpo_lightning.modules.logprob_backends import TokenLogprobs
from drpo_lightning.modules.lora import LoRA
from drpo_lightning.modules.reference import ReferenceModel, adapters_disabled, load_frozen_network
from drpo_lightning.objectives import DRPO
from tests.distributed.strategies import CPUFSDPStrategy


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def weights_of(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.module.parameters()])


@pytest.fixture
def logged(monkeypatch):
    """The values that runs log, by name."""
    scalars = {}

    def keep(self, metrics, step=None):
        for name, value in metrics.items():
            scalars.setdefault(name, []).append(value)

    monkeypatch.setattr(DummyLogger, "log_metrics", keep)
    return scalars


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": -0.1}, "`reference.beta` must be 0 or positive, got -0.1"),
        ({"beta": math.inf}, "`reference.beta` must be 0 or positive, got inf"),
        ({"beta": math.nan}, "`reference.beta` must be 0 or positive, got nan"),
        ({"estimator": "k2"}, "`reference.estimator` must be one of ['k1', 'k3'], got 'k2'"),
        ({"placement": "both"}, "`reference.placement` must be one of ['loss', 'reward'], got 'both'"),
        ({"dtype": "float16"}, "`reference.dtype` must be one of ['float32', 'bfloat16'], got 'float16'"),
        ({"placement": "reward", "importance_weighted": False}, "`reference.importance_weighted` false is of no use"),
    ],
)
def test_bad_settings_raise(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ReferencePenalty(**({"beta": 0.1} | arguments))


def test_a_reference_that_is_no_model_raises_before_anything_is_loaded(model_folder, tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json"):
        PolicyModule(model_folder, reference=ReferencePenalty(0.1, model=str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 0.0}, "is measured, without a penalty"),
        ({"beta": 0.5}, "0.5 r k3 from the model that the training starts from in the loss; .* of KL\\(pi \\|\\| ref"),
        ({"beta": 0.5, "importance_weighted": False}, "0.5 k3 from .* gradient is that of KL\\(ref \\|\\| pi"),
        ({"beta": 0.5, "estimator": "k1", "importance_weighted": False}, "that of nothing, its mean is 0"),
        ({"beta": 0.5, "placement": "reward", "model": "a/b"}, "0.5 per nat of k3 from a/b is taken off the rewards"),
    ],
)
def test_a_run_says_what_the_penalty_is(settings, words):
    assert re.search(words, ReferencePenalty(**settings).describe())


# ---------------------------------------------------------------- the penalty in the reward


def scored_rollout():
    completions = [
        Completion([5, 6], [-0.1, -2.0], "stop"),
        Completion([], [], "length"),
        Completion([7], [-3.0], "stop"),
        Completion([8], [-30.0], "stop"),
    ]
    return Rollout(
        prompts=["a"] * 4,
        prompt_ids=[[1]] * 4,
        completions=completions,
        texts=[""] * 4,
        columns={},
        group_size=2,
        rewards=torch.tensor([1.0, 0.0, 0.0, 1.0]),
        reference_logprobs=[[-0.5, -1.0], [], [-70.0], [-1.0]],
    )


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_reward_penalties_equal_a_float64_loop(estimator):
    rollout = scored_rollout()
    expected = []
    for completion, reference in zip(rollout.completions, rollout.reference_logprobs, strict=True):
        differences = [max(mu - ref, -20) for mu, ref in zip(completion.logprobs, reference, strict=True)]
        estimates = [d if estimator == "k1" else math.exp(-d) - 1 + d for d in differences]
        expected.append(0.3 * math.fsum(estimates))
    found = ReferencePenalty(0.3, estimator, placement="reward").reward_penalties(rollout)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert found[1] == 0


def test_a_penalty_is_in_the_loss_or_in_the_reward(make_run, make_recorder):
    assert ReferencePenalty(0.3).reward_penalties(scored_rollout()) is None
    recorder = make_recorder()
    make_run(recorder, module={"reference": ReferencePenalty(0.3)}).fit()
    batch, policy = recorder.batches[0][1], recorder.outputs[1]["policy_logprobs"]
    assert ReferencePenalty(0.3, placement="reward").token_penalties(policy, batch) is None
    penalties = ReferencePenalty(0.3).token_penalties(policy, batch)
    assert penalties[batch.completion_mask].any()
    assert not penalties[~batch.completion_mask].any()
    assert recorder.rollouts[0].reference_penalties is None


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_advantages_are_taken_of_the_penalized_rewards(make_run, make_recorder, logged, estimator):
    """In the second rollout mu has left the reference; the rewards themselves stay as they are."""
    recorder = make_recorder()
    penalty = ReferencePenalty(5.0, estimator, placement="reward")
    make_run(
        recorder,
        RolloutStatistics(),
        trainer={"max_epochs": 2, "logger": DummyLogger()},
        module={"reference": penalty},
    ).fit()
    first, second = recorder.rollouts
    assert first.reference_penalties.abs().max() < 1e-4
    assert second.reference_penalties.abs().max() > 0.1
    assert second.rewards.tolist() == second.reward_parts["scattered"].tolist()
    penalized = second.rewards.double() - second.reference_penalties.double()
    groups = penalized.view(4, 4)
    advantages = (groups - groups.mean(1, keepdim=True)).flatten()
    for batch in recorder.batches[1]:
        for row, sample in enumerate(batch.sample_ids.tolist()):
            own = batch.advantages[row][batch.completion_mask[row]]
            assert own.tolist() == pytest.approx([advantages[sample].item()] * len(own), abs=1e-5)
    assert logged["reward/reference_kl/mean"][1] == pytest.approx(-second.reference_penalties.mean().item(), rel=1e-5)
    assert logged["reward/mean"][1] == pytest.approx(second.rewards.mean().item(), rel=1e-5)
    assert "optim/reference_penalty" not in logged


# ---------------------------------------------------------------- the penalty in the loss


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_the_loss_is_the_objectives_and_the_penalty(make_run, make_recorder, logged, aggregation):
    recorder = make_recorder()
    make_run(
        recorder,
        trainer={"logger": DummyLogger(), "accumulate_grad_batches": 2},
        module={"reference": ReferencePenalty(3.0), "aggregation": aggregation, "optimizer": sgd},
    ).fit()
    for update in range(2):
        window = slice(2 * update, 2 * update + 2)
        batches, outputs = recorder.batches[0][window], recorder.outputs[window]
        objective, penalty = [], []
        for batch, output in zip(batches, outputs, strict=True):
            for row, mask in enumerate(batch.completion_mask):
                pi, mu, ref = (
                    x[row][mask].double()
                    for x in (output["policy_logprobs"], batch.rollout_logprobs, batch.reference_logprobs)
                )
                penalty.append(3.0 * (pi - mu).exp() * ((ref - pi).exp() - 1 - (ref - pi)))
                objective.append(output["objective"].loss[row][mask].double())
        if aggregation == "token_mean":
            means = [torch.cat(values).mean().item() for values in (objective, penalty)]
        else:
            means = [sum(v.mean().item() for v in values) / len(values) for values in (objective, penalty)]
        assert logged["optim/reference_penalty"][update] == pytest.approx(means[1], rel=1e-3, abs=1e-6)
        assert logged["optim/loss"][update] == pytest.approx(sum(means), rel=1e-4, abs=1e-6)
    assert logged["optim/reference_penalty"][1] > 1e-3


def test_updates_do_not_depend_on_the_micro_batches(make_run):
    weights = []
    for accumulate in (1, 4):
        run = make_run(
            trainer={"accumulate_grad_batches": accumulate},
            module={"reference": ReferencePenalty(3.0, "k1"), "optimizer": sgd},
        )
        run.fit()
        weights.append(weights_of(run))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_the_objective_does_not_see_the_reference(make_run, make_recorder):
    """Loss, gradient coefficient and weight of the objective are those without a reference, on equal weights."""
    outputs = []
    for reference in (None, ReferencePenalty(100.0, "k1")):
        recorder = make_recorder()
        make_run(recorder, module={"reference": reference, "objective": DRPO(0.2)}).fit()
        outputs.append(recorder.outputs[0]["objective"])
    for name in ("loss", "grad_coefficient", "grad_weight", "beyond_clamp"):
        torch.testing.assert_close(getattr(outputs[0], name), getattr(outputs[1], name), rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------- the reference in a run


def test_off_by_default_and_then_only_the_policy_is_loaded(make_run, make_recorder, monkeypatch):
    from transformers import AutoModelForCausalLM

    loaded, original = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **kw: loaded.append(args) or original(*args, **kw)
    )
    counts = []
    for reference in (None, ReferencePenalty(0.0)):
        recorder = make_recorder()
        run = make_run(recorder, module={} if reference is None else {"reference": reference})
        run.fit()
        counts.append(len(loaded))
    assert counts[1] == 2 * counts[0] + 1
    assert PolicyModule(str(run.module.model_name)).reference is None


def test_without_a_reference_nothing_is_scored(make_run, make_recorder):
    recorder = make_recorder()
    run = make_run(recorder)
    run.fit()
    assert run.module.reference_model is None
    assert recorder.rollouts[0].reference_logprobs is None
    assert recorder.batches[0][0].reference_logprobs is None


def test_in_the_first_update_of_a_run_the_policy_is_the_reference(make_run, make_recorder, logged):
    recorder = make_recorder()
    make_run(
        recorder,
        trainer={"logger": DummyLogger(), "max_epochs": 2},
        module={"reference": ReferencePenalty(1.0)},
    ).fit()
    for i, batch in enumerate(itertools.chain.from_iterable(recorder.batches)):
        mask = batch.completion_mask
        assert mask.any()
        difference = (recorder.outputs[i]["policy_logprobs"] - batch.reference_logprobs)[mask].abs().max()
        assert difference < 1e-5 if i == 0 else difference > 1e-3
    penalties = logged["optim/reference_penalty"]
    assert abs(penalties[0]) < 1e-6
    assert min(penalties[1:]) > 1e-6


def test_log_pi_ref_is_that_of_the_frozen_model_at_the_sampling_temperature(make_run, make_recorder, model_folder):
    recorder = make_recorder()
    run = make_run(recorder, trainer={"max_epochs": 2}, module={"reference": ReferencePenalty(0.0)})
    run.fit()
    model = load_language_model(model_folder)
    assert (weights_of(run) - torch.cat([p.detach().flatten() for p in model.parameters()])).abs().max() > 1e-4
    rollout = recorder.rollouts[1]
    for row, completion in enumerate(rollout.completions):
        prompt = rollout.prompt_ids[row]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion.token_ids])).logits[0].double()
        logprobs = (logits / 1.5).log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert rollout.reference_logprobs[row] == pytest.approx(expected.tolist(), abs=1e-4)


def test_the_reference_is_frozen_and_no_part_of_the_module(make_run, tmp_path, model_folder):
    plain, with_reference = make_run(), make_run(module={"reference": ReferencePenalty(1.0)})
    for run in (plain, with_reference):
        run.fit()
    module = with_reference.module
    assert module.state_dict().keys() == plain.module.state_dict().keys()
    assert [n for n, _ in module.named_modules()] == [n for n, _ in plain.module.named_modules()]
    assert dict(module.named_weights()).keys() == dict(plain.module.named_weights()).keys()
    trained = {id(p) for group in with_reference.trainer.optimizers[0].param_groups for p in group["params"]}
    network = module.reference_model.network
    assert trained == {id(p) for p in module.parameters()}
    assert trained.isdisjoint(map(id, network.parameters()))
    assert not network.training
    assert all(not p.requires_grad and p.grad is None for p in network.parameters())
    before = load_language_model(model_folder).state_dict()
    for name, tensor in network.language_model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    sizes = []
    for run in (plain, with_reference):
        run.trainer.save_checkpoint(tmp_path / "run.ckpt")
        sizes.append((tmp_path / "run.ckpt").stat().st_size)
    assert sizes[1] < 1.1 * sizes[0]


def test_a_beta_of_zero_changes_nothing(make_run):
    runs = [make_run(module={"reference": reference}) for reference in (None, ReferencePenalty(0.0))]
    for run in runs:
        run.fit()
    assert torch.equal(*map(weights_of, runs))


@pytest.mark.parametrize(
    "settings",
    [
        {"estimator": "k3"},
        {"estimator": "k3", "importance_weighted": False},
        {"estimator": "k1", "placement": "reward"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_a_large_beta_keeps_the_policy_near_the_reference(make_run, make_recorder, settings):
    def brevity(completion_ids, **_):
        return [-float(len(ids)) for ids in completion_ids]

    shifts = []
    for beta in (0.0, 20.0):
        recorder = make_recorder()
        make_run(
            recorder,
            rewards=[FunctionReward(brevity, name="brevity")],
            trainer={"max_epochs": 5},
            module={"reference": ReferencePenalty(beta, **settings)},
            data={"group_size": 8},
        ).fit()
        batch, policy = recorder.batches[-1][-1], recorder.outputs[-1]["policy_logprobs"]
        shifts.append((policy - batch.reference_logprobs)[batch.completion_mask].abs().mean().item())
    free, held = shifts
    assert held < 0.6 * free


def test_a_reference_of_another_model_starts_with_a_divergence(make_run, make_recorder, model_folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.05)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "other")
    recorder = make_recorder()
    make_run(recorder, module={"reference": ReferencePenalty(0.0, model=str(tmp_path / "other"))}).fit()
    batch, policy = recorder.batches[0][0], recorder.outputs[0]["policy_logprobs"]
    assert (policy - batch.reference_logprobs)[batch.completion_mask].abs().max() > 1e-2


def test_in_bfloat16_the_reference_takes_half_the_memory_and_is_off_by_rounding(make_run, make_recorder):
    recorder = make_recorder()
    run = make_run(recorder, module={"reference": ReferencePenalty(0.0, dtype="bfloat16")})
    run.fit()
    assert {p.dtype for p in run.module.reference_model.network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in run.module.parameters()} == {torch.float32}
    batch, policy = recorder.batches[0][0], recorder.outputs[0]["policy_logprobs"]
    difference = (policy - batch.reference_logprobs)[batch.completion_mask].abs()
    assert 1e-5 < difference.mean() < 0.1


@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_a_run_resumed_within_a_rollout_equals_an_uninterrupted_one(make_run, make_recorder, tmp_path, placement):
    def save(trainer, pl_module, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 0):
            trainer.save_checkpoint(tmp_path / "run.ckpt")

    weights = []
    for recorder, ckpt_path in ((make_recorder(save), None), (make_recorder(), tmp_path / "run.ckpt")):
        run = make_run(
            recorder,
            trainer={"max_epochs": 2},
            module={"reference": ReferencePenalty(2.0, placement=placement)},
        )
        run.fit(ckpt_path=ckpt_path)
        weights.append(weights_of(run))
    assert torch.equal(*weights)


@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_a_reference_cannot_be_added_in_the_middle_of_a_rollout(make_run, make_recorder, tmp_path, placement):
    def save(trainer, pl_module, batch_idx):
        if batch_idx == 0:
            trainer.save_checkpoint(tmp_path / "run.ckpt")

    make_run(make_recorder(save)).fit()
    run = make_run(module={"reference": ReferencePenalty(1.0, placement=placement)})
    with pytest.raises(SettingError, match="was not set when the rollout of this checkpoint was made"):
        run.fit(ckpt_path=tmp_path / "run.ckpt")


def test_a_validation_loads_no_reference(make_run, monkeypatch):
    from drpo_lightning.datamodules import ArithmeticPrompts

    monkeypatch.setattr(reference_module, "load_frozen_network", None)
    run = make_run(
        module={"reference": ReferencePenalty(1.0)},
        data={"val_prompts": ArithmeticPrompts("validation", max_operand=9, num_validation=8)},
    )
    run.trainer.validate(run.module, run.data, verbose=False)
    assert run.module.reference_model is None


# ---------------------------------------------------------------- sharded


@pytest.fixture(params=["fsdp1", "fsdp2"])
def strategy(request):
    yield {
        "fsdp1": CPUFSDPStrategy(state_dict_type="sharded"),
        "fsdp2": ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1),
    }[request.param]
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("default:FSDP is switching to use `NO_SHARD`")
def test_the_reference_is_sharded_as_the_policy_is_and_says_the_same(make_run, make_recorder, strategy):
    runs, recorders = [], []
    for settings in ({}, {"strategy": strategy}):
        recorders.append(make_recorder())
        runs.append(make_run(recorders[-1], trainer=settings, module={"reference": ReferencePenalty(3.0)}))
        runs[-1].fit()
    sharded = runs[1].module
    assert type(sharded.reference_model.network) is type(sharded.network)
    assert not any(parameter.requires_grad for parameter in sharded.reference_model.network.parameters())
    kinds = [
        {type(parameter.data) for parameter in network.parameters()}
        for network in (sharded.reference_model.network, sharded.network)
    ]
    assert kinds[0] == kinds[1]
    logprobs = [torch.cat(list(map(torch.tensor, r.rollouts[0].reference_logprobs))) for r in recorders]
    torch.testing.assert_close(*logprobs, rtol=0, atol=1e-5)
    weights = [dict(run.module.named_weights()) for run in runs]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-6, msg=name)


# ---------------------------------------------------------------- adapters


@pytest.fixture
def adapted(model_folder):
    """The small model with adapters that have left their start, and a batch."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    model = load_language_model(model_folder)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    input_ids = torch.randint(3, 10, (3, 8))
    mask = torch.ones(3, 8, dtype=torch.bool)
    return PolicyNetwork(model), (input_ids, mask, mask)


def test_an_adapted_policy_without_its_adapters_is_the_model_it_started_from(adapted, model_folder):
    network, inputs = adapted
    base = PolicyNetwork(load_language_model(model_folder))
    own = network(*inputs)
    reference = ReferenceModel(network, is_adapted_policy=True)(*inputs)
    assert (own - reference).abs().max() > 1e-2
    assert not reference.requires_grad
    torch.testing.assert_close(reference, base(*inputs), rtol=0, atol=1e-6)
    assert torch.equal(network(*inputs), own)


def test_the_adapters_stay_trained_while_they_are_off(adapted):
    network, inputs = adapted
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert trained
    with adapters_disabled(network):
        assert [name for name, parameter in network.named_parameters() if parameter.requires_grad] == trained
    assert [name for name, parameter in network.named_parameters() if parameter.requires_grad] == trained
    network(*inputs).sum().backward()
    assert all(network.get_parameter(name).grad.any() for name in trained if "lora_B" in name)


def test_after_an_error_the_adapters_are_on(adapted):
    network, inputs = adapted
    own = network(*inputs)
    with pytest.raises(KeyError), adapters_disabled(network):
        raise KeyError
    assert torch.equal(network(*inputs), own)


def test_with_adapters_the_reference_is_the_policy_without_them_and_no_second_model(
    make_run, make_recorder, model_folder
):
    recorder = make_recorder()
    settings = {"peft": LoRA(r=4), "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)}
    run = make_run(recorder, trainer={"max_epochs": 2}, module={"reference": ReferencePenalty(0.5)} | settings)
    run.fit()
    assert run.module.reference_model.network is run.module.network
    base = PolicyNetwork(load_language_model(model_folder), temperature=1.5)
    first, later = recorder.batches[0][0], recorder.batches[1][1]
    for batch in (first, later):
        mask = batch.completion_mask
        expected = base(batch.input_ids, batch.attention_mask, mask)
        torch.testing.assert_close(batch.reference_logprobs[mask], expected[mask], rtol=0, atol=1e-5)
    moved = (recorder.outputs[-1]["policy_logprobs"] - later.reference_logprobs)[later.completion_mask]
    assert moved.abs().max() > 1e-3


def test_with_adapters_a_model_of_its_own_is_loaded_if_named(make_run, model_folder):
    run = make_run(module={"reference": ReferencePenalty(0.5, model=model_folder), "peft": LoRA(r=4)})
    run.fit()
    assert run.module.reference_model.network is not run.module.network


def test_a_network_without_adapters_cannot_be_its_own_reference(model_folder):
    network = PolicyNetwork(load_language_model(model_folder))
    with pytest.raises(ValueError, match="no adapters to switch off"), adapters_disabled(network):
        pass


def test_a_frozen_network_has_the_settings_of_the_policy(model_folder):
    token_logprobs = TokenLogprobs(chunk_bytes=5)
    network = load_frozen_network(
        model_folder, SingleDeviceStrategy("cpu"), dtype=torch.bfloat16, temperature=0.7, token_logprobs=token_logprobs
    )
    assert (network.temperature, network.token_logprobs) == (0.7, token_logprobs)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("settings", [None, ReferencePenalty(0.0, "k1", placement="reward"), ReferencePenalty(0.1)])
def test_a_rollout_of_a_checkpoint_is_penalized_as_it_is_set_now(make_run, make_recorder, tmp_path, settings):
    path = tmp_path / "run.ckpt"

    def save(trainer, module, batch_idx):
        if batch_idx == 0:
            trainer.save_checkpoint(path)

    penalty = ReferencePenalty(1.0, "k1", placement="reward")
    saved = make_run(make_recorder(save), module={"reference": penalty}, trainer={"max_epochs": 1})
    saved.fit()
    assert saved.data.rollout.reference_penalties is not None
    resumed = make_run(module={"reference": settings}, trainer={"max_epochs": 1})
    resumed.fit(ckpt_path=path)
    penalties = resumed.data.rollout.reference_penalties
    assert penalties is None if settings is None or settings.placement == "loss" else not penalties.any()
