"""The policy's entropy: that of the whole distribution at every token, of the completions and weights asked for."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from drpo_lightning.batch import Completion
from drpo_lightning.callbacks import PolicyEntropy, PolicyShift
from drpo_lightning.callbacks.policy_entropy import outer_quarters
from drpo_lightning.rollout import RolloutHooks, TransformersEngine
from tests.conftest import MODEL_FOLDER, scattered_reward
from tests.rollout.ranks import WORLD, Ranks

TEMPERATURE = 1.5
NAMES = {f"entropy/{name}" for name in ("mean", "mean_first_quarter", "mean_last_quarter", "p50", "p90", "p99", "max")}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.3)


class Reference(Callback, RolloutHooks):
    """Entropies of every completion, from the formula, in float64 and under the weights of the moment."""

    def __init__(self):
        self.rollouts = []

    def on_rollout_end(self, trainer, pl_module, rollout):
        weights = {name: weight.double() for name, weight in pl_module.named_weights()}
        self.rollouts.append(entropies_of(weights, rollout))


@torch.no_grad()
def entropies_of(weights, rollout):
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float64).eval()
    model.load_state_dict(weights)
    completions = []
    for prompt, completion in zip(rollout.prompt_ids, rollout.completions, strict=True):
        entropies = []
        for i in range(len(completion.token_ids)):
            logits = model(torch.tensor([prompt + completion.token_ids[:i]])).logits[0, -1].numpy() / TEMPERATURE
            p = np.exp(logits) / np.exp(logits).sum()
            entropies.append(-(p * np.log(p)).sum())
        completions.append(entropies)
    return completions


def check(logged, completions):
    """That logged values are those of completions, given as their entropies."""
    tokens = sorted(x for completion in completions for x in completion)
    first = [x for c in completions for i, x in enumerate(c) if i < len(c) / 4]
    last = [x for c in completions for i, x in enumerate(c) if len(c) - 1 - i < len(c) / 4]
    assert logged["entropy/mean"] == pytest.approx(np.mean(tokens), rel=1e-4)
    assert logged["entropy/mean_first_quarter"] == pytest.approx(np.mean(first), rel=1e-4)
    assert logged["entropy/mean_last_quarter"] == pytest.approx(np.mean(last), rel=1e-4)
    assert logged["entropy/max"] == pytest.approx(tokens[-1], rel=1e-4)
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        exact = tokens[int(np.ceil(q * len(tokens))) - 1]
        assert logged[f"entropy/{name}"] == pytest.approx(exact, rel=0.024, abs=1e-4), name


def values_at(logger, step):
    found = {name: dict(entries)[step] for name, entries in logger.scalars.items() if name.startswith("entropy/")}
    assert found.keys() == NAMES
    return found


def steps_of(logger):
    return logger.steps("entropy/mean")


@pytest.mark.parametrize("packing", ["always", "never"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_entropies_are_those_of_the_whole_distribution(make_run, make_memory, packing, accumulate):
    logger, reference = make_memory(), Reference()
    make_run(
        reference,
        PolicyEntropy(num_sequences=99),
        trainer={"logger": logger, "max_epochs": 2, "accumulate_grad_batches": accumulate},
        module={"optimizer": sgd, "packing": packing},
    ).fit()
    assert steps_of(logger) == [0, 2]
    for step, completions in zip((0, 2), reference.rollouts, strict=True):
        assert len(completions) == 16
        assert len({len(completion) for completion in completions}) > 1
        check(values_at(logger, step), completions)
    assert logger.values("entropy/mean")[0] != pytest.approx(logger.values("entropy/mean")[1], rel=1e-3)


def test_the_completions_asked_for_are_spread_over_the_rollout(make_run, make_memory):
    logger, reference = make_memory(), Reference()
    make_run(reference, PolicyEntropy(num_sequences=3), trainer={"logger": logger}).fit()
    check(values_at(logger, 0), [reference.rollouts[0][row] for row in (0, 5, 10)])


@pytest.mark.parametrize(("num_prompts", "rows"), [(4, [0]), (24, [0, 32, 64])])
def test_by_default_one_completion_in_32_is_taken(make_run, make_memory, num_prompts, rows):
    logger, reference = make_memory(), Reference()
    make_run(reference, PolicyEntropy(), trainer={"logger": logger}, data={"num_prompts": num_prompts}).fit()
    check(values_at(logger, 0), [reference.rollouts[0][row] for row in rows])


@pytest.mark.parametrize(("every_n_rollouts", "steps"), [(1, [0, 2, 4]), (2, [0, 4]), (5, [0])])
def test_every_nth_rollout_is_looked_at(make_run, make_memory, every_n_rollouts, steps):
    logger = make_memory()
    make_run(PolicyEntropy(every_n_rollouts=every_n_rollouts), trainer={"logger": logger, "max_epochs": 3}).fit()
    assert steps_of(logger) == steps


def test_the_mean_is_about_what_the_sampled_tokens_estimate(make_run, make_memory):
    logger = make_memory()
    make_run(
        PolicyEntropy(num_sequences=256),
        PolicyShift(),
        trainer={"logger": logger},
        module={"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)},
        data={"num_prompts": 64, "num_updates": 1},
    ).fit()
    tokens = 256 * 2  # at least
    assert logger.values("entropy/mean")[0] == pytest.approx(logger.values("entropy/rollout")[0], abs=4 / tokens**0.5)


def test_a_forward_pass_is_no_larger_than_a_micro_batch_and_has_no_gradient(make_run):
    passes = []

    def note(network, inputs, settings):
        if settings.get("returns_entropy"):
            passes.append((len(inputs[0]), torch.is_grad_enabled()))

    class Attach(Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.network.register_forward_pre_hook(note, with_kwargs=True)

    make_run(Attach(), PolicyEntropy(num_sequences=5), trainer={"accumulate_grad_batches": 4}).fit()
    assert passes == [(2, False), (2, False), (1, False)]


def test_measuring_does_not_change_the_training(make_run):
    runs = [make_run(*callbacks) for callbacks in ([], [PolicyEntropy(num_sequences=8)])]
    for run in runs:
        run.fit()
    without, measured = (dict(run.module.named_weights()) for run in runs)
    for name in without:
        assert torch.equal(without[name], measured[name]), name


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(make_run, make_recorder, make_memory, tmp_path):
    def save(trainer, pl_module, batch_idx):
        if trainer.global_step == 1:
            trainer.save_checkpoint(tmp_path / "run.ckpt")

    scalars = []
    for recorder, ckpt_path in ((make_recorder(save), None), (make_recorder(), tmp_path / "run.ckpt")):
        logger = make_memory()
        make_run(recorder, PolicyEntropy(), trainer={"logger": logger, "max_epochs": 2}).fit(ckpt_path=ckpt_path)
        scalars.append({name: logger.scalars[name] for name in NAMES})
    assert scalars[1] == {name: entries[1:] for name, entries in scalars[0].items()}
    assert [step for step, _ in scalars[1]["entropy/mean"]] == [2]


def test_the_histogram_holds_every_token(make_run, tmp_path):
    reference = Reference()
    logger = TensorBoardLogger(tmp_path, name="", version="")
    make_run(reference, PolicyEntropy(num_sequences=16), trainer={"logger": logger}).fit()
    (event,) = EventAccumulator(str(tmp_path)).Reload().Histograms("histogram/entropy")
    tokens = [x for completion in reference.rollouts[0] for x in completion]
    assert event.step == 0
    assert event.histogram_value.num == len(tokens)
    assert event.histogram_value.sum == pytest.approx(sum(tokens), rel=1e-4)


def test_outer_quarters_worked_by_hand():
    completion_mask = torch.zeros(4, 10, dtype=torch.bool)
    for row, (start, length) in enumerate(((2, 8), (1, 5), (3, 1), (0, 0))):
        completion_mask[row, start : start + length] = True
    first, last = (quarter.int().tolist() for quarter in outer_quarters(completion_mask))
    assert first[0] == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert last[0] == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    assert first[1] == [0, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert last[1] == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0]
    assert first[2] == last[2] == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert first[3] == last[3] == [0] * 10


@pytest.mark.parametrize("name", ["num_sequences", "every_n_rollouts"])
def test_settings_must_be_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        PolicyEntropy(**{name: 0})


# ---------------------------------------------------------------- several ranks


class OneRankWithoutTokens(Callback, RolloutHooks):
    """Takes the last rank's tokens away."""

    def on_rollout_end(self, trainer, pl_module, rollout):
        if trainer.global_rank == trainer.world_size - 1:
            rollout.completions = [Completion([], [], "stop") for _ in rollout.completions]


def sharded_run(folder):
    """A rollout of a policy sharded by FSDP2: what is logged, and this rank's entropies."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import ModelParallelStrategy

    from drpo_lightning.batch import Sampling
    from drpo_lightning.callbacks import FunctionReward
    from drpo_lightning.datamodules import ArithmeticPrompts, RolloutDataModule
    from drpo_lightning.modules import PolicyModule
    from tests.callbacks.conftest import MemoryLogger

    logger, reference = MemoryLogger(), Reference()
    trainer = Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1),
        max_epochs=1,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=[
            FunctionReward(scattered_reward, name="scattered"),
            OneRankWithoutTokens(),
            reference,
            PolicyEntropy(num_sequences=3),
        ],
    )
    module = PolicyModule(str(MODEL_FOLDER), optimizer=sgd, temperature=TEMPERATURE)
    data = RolloutDataModule(
        TransformersEngine(),
        ArithmeticPrompts(max_operand=9, num_validation=20),
        str(MODEL_FOLDER),
        num_prompts=WORLD,
        group_size=4,
        num_updates=2,
        sampling=Sampling(max_tokens=4, temperature=TEMPERATURE),
    )
    trainer.fit(module, data)
    return dict(logger.scalars), reference.rollouts, trainer.global_step


def test_of_a_sharded_policy_it_is_over_all_ranks_and_one_may_have_no_tokens(tmp_path):
    ranks = Ranks(tmp_path)
    try:
        results = ranks(sharded_run, tmp_path, timeout_seconds=120)
    finally:
        ranks.close()
    scalars = [{name: values for name, values in found.items() if name in NAMES} for found, _, _ in results]
    assert scalars[0] == scalars[1] == scalars[2]
    assert scalars[0].keys() == NAMES
    assert [step for _, _, step in results] == [2] * WORLD
    completions = [rollout[row] for _, (rollout,), _ in results for row in (0, 1, 2)]
    assert completions[-3:] == [[], [], []]
    check({name: value for name, ((_, value),) in scalars[0].items()}, completions)
