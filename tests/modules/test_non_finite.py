"""An update with a NaN or infinite number in it is never applied, and its samples are written down."""

import json
import math
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from drpo_lightning.callbacks import Guardrail, PolicyCheckpoint, PolicyShift, TokenExport
from drpo_lightning.errors import NonFiniteError
from drpo_lightning.modules.non_finite import MAX_FILES, MAX_SAMPLES
from drpo_lightning.modules.reference import ReferencePenalty
from tests.callbacks.conftest import MemoryLogger
from tests.planted import Breaks, Plant, Recorder, SparingAdamW, adamw, same_tensors

LEFT_OUT = r"ignore:update \d+ has NaN or infinite"


def records(folder, name):
    return [json.loads(line) for line in (folder / "non_finite" / name).read_text().splitlines()]


# ---------------------------------------------------------------- stopping


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_logprob_stops_the_run_before_the_weights_change(make_run, tmp_path, value):
    recorder = Recorder()
    plant = Plant("policy_logprobs", updates=[3], row=1, value=value)
    run = make_run(plant, recorder, trainer={"max_epochs": 3})
    with pytest.raises(NonFiniteError, match=r"update 3 has NaN or infinite policy_logprobs \(1 tokens\)") as caught:
        run.fit()
    assert f"in samples [{plant.samples[3]}] of rank 0; see {tmp_path}/non_finite. The weights are" in str(caught.value)
    assert "`model.max_skipped_updates` 0" in str(caught.value)
    assert run.trainer.global_step == 2
    assert same_tensors(recorder.now(run.trainer, run.module), recorder.states[2])


def test_the_samples_are_written_down(make_run, make_recorder, tmp_path):
    recorder = make_recorder()
    plant = Plant("policy_logprobs", updates=[2], row=2)
    with pytest.raises(NonFiniteError):
        make_run(plant, recorder).fit()
    (record,) = records(tmp_path, "update_000002.rank0.jsonl")
    (rollout,) = recorder.rollouts
    number = plant.samples[2]
    completion = rollout.completions[number]
    assert record["sample_id"] == number
    assert record["prompt"] == rollout.prompts[number]
    assert record["completion"] == rollout.texts[number]
    assert record["reward"] == pytest.approx(rollout.rewards[number].item())
    assert record["prompt_ids"] == rollout.prompt_ids[number]
    assert record["token_ids"] == completion.token_ids
    assert record["rollout_logprobs"] == pytest.approx(completion.logprobs)
    assert record["not_finite_at"]["policy_logprobs"] == [0]
    assert record["policy_logprobs"][0] == "nan"
    assert all(isinstance(value, float) for value in record["policy_logprobs"][1:])
    assert len(record["advantages"]) == len(record["objective_loss"]) == len(completion.token_ids)


@pytest.mark.parametrize(
    ("quantity", "reason"),
    [
        ("rollout_logprobs", r"rollout_logprobs \(1 tokens\), objective_loss \(1 tokens\), loss, in samples"),
        ("advantages", r"advantages \(1 tokens\), objective_loss \(1 tokens\), loss, gradient, in samples"),
        ("objective_loss", r"objective_loss \(1 tokens\), loss, in samples"),
        ("gradient", "gradient, in no sample of its own"),
    ],
)
def test_what_broke_first_is_named_first(make_run, quantity, reason):
    plant = Plant(quantity, updates=[1], row=3)
    module = {"objective": Breaks(plant)} if quantity == "objective_loss" else {}
    with pytest.raises(NonFiniteError, match=f"update 1 has NaN or infinite {reason}"):
        make_run(plant, module=module).fit()


def test_a_reference_that_breaks_is_named(make_run, model_folder, monkeypatch):
    run = make_run(module={"reference": ReferencePenalty(beta=0.1, model=model_folder)})

    def broken(rollout, **settings):
        logprobs = [[-1.0] * len(completion.token_ids) for completion in rollout.completions]
        logprobs[5][0] = math.nan
        return logprobs

    monkeypatch.setattr(run.module, "score", broken)
    with pytest.raises(NonFiniteError, match=r"NaN or infinite reference_logprobs \(1 tokens\), reference_penalty \(1"):
        run.fit()


def test_numbers_outside_the_completions_may_be_anything(make_run):
    run = make_run(Plant("policy_logprobs", updates=[1, 2], row=0, is_outside=True))
    run.fit()
    assert run.trainer.global_step == 2


def test_a_broken_token_that_the_objective_leaves_out_is_found_too(make_run):
    """With A = 0 and a loss that is a constant, nothing but the token itself is NaN."""
    plant = Plant("policy_logprobs", updates=[1], row=0)
    with pytest.raises(NonFiniteError, match=r"infinite policy_logprobs \(1 tokens\), in samples"):
        make_run(plant, module={"objective": Breaks(plant, ignores_nan=True)}).fit()


# ---------------------------------------------------------------- leaving out


@pytest.mark.filterwarnings(LEFT_OUT)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("quantity", ["policy_logprobs", "objective_loss", "gradient"])
def test_a_skipped_update_changes_nothing_and_those_after_are_as_if_it_had_not_been(
    make_run, quantity, clip, accumulate
):
    trainer = {"max_epochs": 3, "accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    logger, recorder, reference = MemoryLogger(), Recorder(), Recorder()
    plant = Plant(quantity, updates=[3], row=0)
    module = {"max_skipped_updates": 1, "optimizer": adamw}
    module |= {"objective": Breaks(plant)} if quantity == "objective_loss" else {}
    make_run(plant, recorder, trainer={**trainer, "logger": logger}, module=module).fit()
    # The same run, whose optimizer leaves the third update out by itself.
    make_run(reference, trainer=trainer, module={"optimizer": lambda p: SparingAdamW(p, updates=[3])}).fit()
    assert same_tensors(recorder.states[3], recorder.states[2])
    assert not same_tensors(recorder.states[4], recorder.states[3])
    assert all(same_tensors(recorder.states[step], reference.states[step]) for step in range(1, 7))
    assert logger.values("optim/skipped_updates") == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(("updates", "last"), [([1, 3, 5], 6), ([1, 2, 4, 5, 6], 5), ([2, 3, 4], 3)])
def test_so_many_in_succession_are_left_out_and_the_next_stops_the_run(make_run, updates, last):
    run = make_run(
        Plant("policy_logprobs", updates=updates, row=0), module={"max_skipped_updates": 2}, trainer={"max_epochs": 3}
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if last == 6:
            run.fit()
        else:
            with pytest.raises(NonFiniteError, match=f"update {last + 1} has"):
                run.fit()
    assert run.trainer.global_step == last
    left_out = [str(entry.message) for entry in caught if "left out" in str(entry.message)]
    assert len(left_out) == len([step for step in updates if step <= last])
    assert left_out[0].endswith("The update is left out; updates left out before it: 0")


@pytest.mark.filterwarnings(LEFT_OUT)
def test_statistics_and_rules_live_through_a_skipped_update(make_run, tmp_path):
    logger = MemoryLogger()
    callbacks = [PolicyShift(), TokenExport(str(tmp_path / "tokens")), Guardrail(checkpoint=False)]
    plant = Plant("policy_logprobs", updates=[2], row=0)
    run = make_run(plant, *callbacks, module={"max_skipped_updates": 1}, trainer={"max_epochs": 2, "logger": logger})
    run.fit()
    assert run.trainer.global_step == 4
    assert all(map(math.isfinite, logger.values("policy_shift/abs_mean")[2:]))


@pytest.mark.filterwarnings(LEFT_OUT)
def test_files_and_their_samples_are_limited(make_run, tmp_path):
    plant = Plant("gradient", updates=range(1, 100), row=0)
    run = make_run(
        plant,
        module={"max_skipped_updates": 99},
        data={"num_prompts": 12, "num_updates": 2},
        trainer={"max_epochs": MAX_FILES // 2 + 1},
    )
    run.fit()
    files = sorted((tmp_path / "non_finite").iterdir())
    assert [file.name for file in files] == [f"update_{n:06d}.rank0.jsonl" for n in range(1, MAX_FILES + 1)]
    assert all(len(records(tmp_path, file.name)) == MAX_SAMPLES < 24 for file in files)


@pytest.mark.filterwarnings(LEFT_OUT)
def test_skipped_updates_are_counted_over_a_resume(make_run, make_recorder, tmp_path):
    def save(trainer, pl_module, batch_idx):
        if trainer.global_step == 3:
            trainer.save_checkpoint(tmp_path / "run.ckpt")

    parts = {"module": {"max_skipped_updates": 2}, "trainer": {"max_epochs": 2}}
    make_run(Plant("gradient", updates=[2, 3], row=0), make_recorder(save), **parts).fit()
    resumed = make_run(Plant("gradient", updates=[4], row=0), **parts)
    with pytest.raises(NonFiniteError, match="update 4 has"):
        resumed.fit(ckpt_path=tmp_path / "run.ckpt")


def test_a_number_of_updates_is_not_negative(make_run):
    with pytest.raises(ValueError, match=r"`model\.max_skipped_updates` must be 0 or positive, got -1"):
        make_run(module={"max_skipped_updates": -1})


# ---------------------------------------------------------------- weights that are broken themselves


def break_weight(trainer, pl_module, batch_idx):
    if trainer.global_step == 2:
        with torch.no_grad():
            next(iter(pl_module.parameters()))[5, 7] = math.nan


def test_weights_that_are_nan_stop_the_run_whatever_may_be_skipped(make_run, make_recorder):
    run = make_run(make_recorder(break_weight), module={"max_skipped_updates": 9}, data={"num_updates": 4})
    with pytest.raises(NonFiniteError, match=r"update 3 has .* The weights are NaN or infinite themselves"):
        run.fit()


@pytest.mark.filterwarnings("ignore:.*a weight of the policy is NaN or infinite after update 2")
@pytest.mark.parametrize("num_updates", [1, 2, 4], ids=["next rollout", "end of the rollout", "middle of the rollout"])
def test_weights_that_are_nan_are_not_saved_over_sound_ones(make_run, make_recorder, tmp_path, num_updates):
    checkpoint = PolicyCheckpoint(dirpath=tmp_path / "checkpoints", every_n_train_steps=1, save_top_k=1)
    run = make_run(
        checkpoint,
        make_recorder(break_weight),
        trainer={"enable_checkpointing": True, "max_epochs": 4},
        data={"num_updates": num_updates},
    )
    with pytest.raises((NonFiniteError, ValueError), match="NaN or infinite"):
        run.fit()
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] >= 1
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stopped_run_goes_on_from_before_the_update(make_run, tmp_path, accumulate):
    def run_of(*callbacks, **settings):
        checkpoint = PolicyCheckpoint(dirpath=tmp_path / "checkpoints")
        trainer = {"enable_checkpointing": True, "max_epochs": 2, "accumulate_grad_batches": accumulate}
        return make_run(checkpoint, *callbacks, trainer=trainer, **settings)

    whole = make_run(recorder := Recorder(), trainer={"max_epochs": 2, "accumulate_grad_batches": accumulate})
    whole.fit()
    with pytest.raises(NonFiniteError, match="update 2 has"):
        run_of(Plant("policy_logprobs", updates=[2], row=0)).fit()
    resumed = run_of(again := Recorder())
    resumed.fit(ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert resumed.trainer.callback_metrics["optim/skipped_updates"] == 0  # it has not been left out, but trained
    assert {2, 3, 4} <= again.states.keys()
    assert all(same_tensors(again.states[step], recorder.states[step]) for step in again.states)


# ---------------------------------------------------------------- float16


class Scale(Callback):
    """Notes the loss scale after every update."""

    def __init__(self):
        self.scales = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.scales.append(trainer.precision_plugin.scaler.get_scale())


def float16(scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)], "max_epochs": 3}


def test_an_overflow_of_float16_is_left_to_the_loss_scaler(make_run, tmp_path):
    logger, recorder, scale = MemoryLogger(), Recorder(), Scale()
    run = make_run(recorder, scale, trainer={**float16(2.0**40), "logger": logger}, data={"num_updates": 8})
    run.fit()
    skipped = logger.values("optim/skipped_updates")
    assert skipped[-1] == skipped[-2] > 3
    assert scale.scales[-1] == 2.0 ** (40 - skipped[-1])
    assert not (tmp_path / "non_finite").exists()
    for step in range(2, 25):
        assert same_tensors(recorder.states[step], recorder.states[step - 1]) == (skipped[step - 1] > skipped[step - 2])


def test_in_float16_a_broken_logprob_is_not(make_run):
    with pytest.raises(NonFiniteError, match="update 1 has NaN or infinite policy_logprobs"):
        make_run(Plant("policy_logprobs", updates=[1], row=0), trainer=float16(1024.0)).fit()


def test_in_float16_a_gradient_that_no_scale_helps_is_not(make_run):
    with pytest.raises(NonFiniteError, match="update 1 has NaN or infinite gradient"):
        make_run(Plant("gradient", updates=[1], row=0), trainer=float16(1.0)).fit()
