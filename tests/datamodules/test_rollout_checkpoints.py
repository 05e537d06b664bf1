"""A rollout in a checkpoint: a resumed run is the one that was never interrupted."""

from datetime import date

import pytest
import torch
from lightning.pytorch import Callback

from drpo_lightning.datamodules import ArithmeticPrompts
from drpo_lightning.errors import SettingError
from drpo_lightning.objectives import ClippedRatio, Decoupled, TopKDPPO
from tests.datamodules.rollout_runs import Listed, sampled_sequences, trained_sequences, trained_tokens, weights_of

# ---------------------------------------------------------------- checkpoints


def saved_and_read(state, tmp_path):
    torch.save(state, tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True)


def test_the_state_in_the_middle_of_a_rollout_survives_a_file(make_run, make_recorder, tmp_path):
    states = []

    def save(trainer, pl_module, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            states.append(saved_and_read(trainer.datamodule.state_dict(), tmp_path))

    recorder = make_recorder(save)
    run = make_run(recorder, trainer={"max_epochs": 2, "accumulate_grad_batches": 2})
    run.fit()
    fresh = make_run(trainer={"accumulate_grad_batches": 2})
    fresh.data.trainer = fresh.trainer
    fresh.data.load_state_dict(states[0])
    assert fresh.data.iteration == 2
    assert sampled_sequences(fresh.data.rollout) == sampled_sequences(recorder.rollouts[1])
    assert fresh.data.rollout.rewards.tolist() == recorder.rollouts[1].rewards.tolist()
    assert states[0]["updates"] == 1


def test_the_state_between_rollouts_holds_no_rollout(make_run, tmp_path):
    run = make_run(trainer={"max_epochs": 2})
    run.fit()
    state = saved_and_read(run.data.state_dict(), tmp_path)
    split = {"num_prompts": 4, "group_size": 4, "num_updates": 2, "seed": 0}
    assert len(state.pop("random")) == 1
    counts = {"iteration": 2, "updates": 2, "accumulate_grad_batches": 1}
    assert state == {**counts, "split": split, "rollouts": [], "schedule": {"position": 8}}
    fresh = make_run()
    fresh.data.trainer = fresh.trainer
    fresh.data.load_state_dict({**state, "random": run.data.state_dict()["random"]})
    assert (fresh.data.iteration, fresh.data.rollout) == (2, None)


def test_validation_takes_the_weights_of_a_checkpoint_alone(make_run):
    run = make_run()
    run.fit()
    state = run.data.state_dict()
    fresh = make_run()
    fresh.data.trainer = fresh.trainer
    fresh.trainer.state.fn = "validate"
    fresh.data.load_state_dict(state)
    assert fresh.data.iteration == 0


@pytest.mark.parametrize(("name", "value"), [("num_prompts", 8), ("group_size", 2), ("num_updates", 4), ("seed", 1)])
def test_a_rollout_that_is_partly_trained_on_must_be_split_as_before(make_run, make_recorder, tmp_path, name, value):
    def save(trainer, pl_module, batch_idx):
        trainer.save_checkpoint(tmp_path / f"{batch_idx}.ckpt")

    run = make_run(make_recorder(save))
    run.fit()
    other = make_run(data={name: value}, trainer={"max_epochs": 2})
    with pytest.raises(SettingError, match=rf"`data\.{name}` must be {run.data._split[name]}, got {value}: the checkp"):
        other.fit(ckpt_path=tmp_path / "0.ckpt")
    between = make_run(data={name: value}, trainer={"max_epochs": 2})
    between.fit(ckpt_path=tmp_path / "1.ckpt")
    assert between.data.iteration == 2


def resumed(make_run, make_recorder, path, *, at, trainer=None, changed=None, **settings):
    """Trains without a break, saving a checkpoint at an epoch and micro-batch; then again from that checkpoint.

    `changed` are settings of the trainer that the resumed run has otherwise.
    """

    def save(trainer, pl_module, batch_idx):
        if (trainer.current_epoch, batch_idx) == at:
            trainer.save_checkpoint(path)

    trainer = {"max_epochs": 3} | (trainer or {})
    recorder, second = make_recorder(save), make_recorder()
    whole = make_run(recorder, trainer=trainer, **settings)
    whole.fit()
    again = make_run(second, trainer=trainer | (changed or {}), **settings)
    again.fit(ckpt_path=path)
    return whole, again, recorder, second


@pytest.mark.parametrize("at", [(0, 1), (1, 1), (1, 3), (1, 7)])
def test_a_resumed_run_equals_an_uninterrupted_one(make_run, make_recorder, tmp_path, at):
    whole, again, recorder, second = resumed(
        make_run,
        make_recorder,
        tmp_path / "run.ckpt",
        at=at,
        trainer={"accumulate_grad_batches": 2},
        data={"num_updates": 4},
    )
    assert torch.equal(weights_of(whole), weights_of(again))
    assert whole.trainer.global_step == again.trainer.global_step == 12
    left = [trained_sequences([b]) for batches in second.batches for b in batches]
    assert left == [trained_sequences([b]) for batches in recorder.batches for b in batches][8 * at[0] + at[1] + 1 :]
    assert len(second.rollouts) == 2 - at[0]


@pytest.mark.parametrize("objective", [TopKDPPO(5, "kl", 1e-4), Decoupled(ClippedRatio(0.01, 0.01))], ids=repr)
@pytest.mark.parametrize("at", [(0, 0), (1, 2)])
def test_a_resumed_run_keeps_what_its_objective_asks_for(make_run, make_recorder, tmp_path, objective, at):
    whole, again, recorder, second = resumed(
        make_run,
        make_recorder,
        tmp_path / "run.ckpt",
        at=at,
        trainer={"max_epochs": 2},
        data={"num_updates": 4},
        module={"objective": objective, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1)},
    )
    assert torch.equal(weights_of(whole), weights_of(again))
    left = [b for batches in second.batches for b in batches]
    trained = [b for batches in recorder.batches for b in batches][4 * at[0] + at[1] + 1 :]
    for a, b in zip(left, trained, strict=True):
        for name in ("sample_ids", "proximal_logprobs", "topk_ids", "topk_logprobs"):
            ours, theirs = getattr(a, name), getattr(b, name)
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)
    names = ("topk_ids", "topk_logprobs") if objective.num_topk else ("proximal_logprobs",)
    assert all(getattr(left[0], name) is not None for name in names)
    kept = [output["objective"].keep[batch.completion_mask] for output, batch in zip(second.outputs, left, strict=True)]
    assert 0 < torch.cat(kept).float().mean() < 1


@pytest.mark.parametrize("at", [(0, 0), (0, 1), (1, 0), (1, 4)])
def test_an_update_that_was_broken_off_is_begun_again(make_run, make_recorder, tmp_path, at):
    settings = {"trainer": {"accumulate_grad_batches": 3}, "data": {"num_prompts": 3}}
    whole, again, recorder, second = resumed(make_run, make_recorder, tmp_path / "run.ckpt", at=at, **settings)
    assert torch.equal(weights_of(whole), weights_of(again))
    assert whole.trainer.global_step == again.trainer.global_step == 6
    assert whole.trainer.current_epoch == again.trainer.current_epoch == 3
    left = [trained_sequences([b]) for batches in second.batches for b in batches]
    first = 6 * at[0] + (at[1] + 1) // 3 * 3
    assert left == [trained_sequences([b]) for batches in recorder.batches for b in batches][first:]


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("at", [(0, 0), (1, 1), (1, 2), (1, 3)])
def test_a_resumed_run_may_have_other_micro_batches(make_run, make_recorder, tmp_path, at, window):
    whole, again, recorder, second = resumed(
        make_run,
        make_recorder,
        tmp_path / "run.ckpt",
        at=at,
        trainer={"accumulate_grad_batches": 2, "max_epochs": 4},
        changed={"accumulate_grad_batches": window},
        module={"optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)},
    )
    # Micro-batches are added up in another order, in float32.
    assert weights_of(again) == pytest.approx(weights_of(whole), abs=1e-5)
    assert whole.trainer.global_step == again.trainer.global_step == 8
    assert whole.trainer.current_epoch == again.trainer.current_epoch == 4
    updates = [trained_tokens(batches[i : i + 2]) for batches in recorder.batches for i in (0, 2)]
    flat = [batch for batches in second.batches for batch in batches]
    left = [trained_tokens(flat[i : i + window]) for i in range(0, len(flat), window)]
    assert left == updates[2 * at[0] + (at[1] + 1) // 2 :]


class SaveAt(Callback):
    """Saves a checkpoint in some hook at some step, and notes what Lightning calls, at which epoch and step."""

    def __init__(self, path=None, hook="", step=0):
        self.path, self.moment = path, (hook, step)
        self.calls = []

    def on_train_epoch_start(self, trainer, pl_module):
        self._call(trainer, "epoch start")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._call(trainer, "batch end")

    def on_validation_end(self, trainer, pl_module):
        self._call(trainer, "validation end")

    def on_train_epoch_end(self, trainer, pl_module):
        self._call(trainer, "epoch end")

    def _call(self, trainer, hook):
        if self.path is not None and (hook, trainer.global_step) == self.moment:
            trainer.save_checkpoint(self.path)
            self.path = None
        self.calls.append((hook, trainer.current_epoch, trainer.global_step))


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 6}], ids=["epochs", "steps"])
@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("epoch start", 0),
        ("epoch start", 2),
        ("batch end", 1),
        ("batch end", 2),
        ("validation end", 2),
        ("epoch end", 2),
    ],
)
def test_a_run_goes_on_from_any_moment_and_then_again(make_run, tmp_path, limit, hook, step):
    def run(watch, path=None):
        validation = ArithmeticPrompts("validation", max_operand=9, num_validation=4)
        made = make_run(watch, trainer={**limit, "num_sanity_val_steps": 0}, data={"val_prompts": validation})
        made.fit(ckpt_path=path)
        return made

    first, second, third = (
        SaveAt(tmp_path / "1.ckpt", hook, step),
        SaveAt(tmp_path / "2.ckpt", "batch end", 4),
        SaveAt(),
    )
    whole = run(first)
    resumed = [run(second, tmp_path / "1.ckpt"), run(third, tmp_path / "2.ckpt")]
    for watch, other in zip((second, third), resumed, strict=True):
        assert torch.equal(weights_of(other), weights_of(whole))
        assert (other.trainer.global_step, other.trainer.current_epoch) == (6, 3)
        assert watch.calls == first.calls[-len(watch.calls) :]
    assert len(third.calls) == 5


def test_a_run_of_cut_rollouts_resumes_with_a_new_one(make_run, make_recorder, tmp_path):
    whole, again, _, second = resumed(
        make_run, make_recorder, tmp_path / "run.ckpt", at=(0, 0), trainer={"limit_train_batches": 1}
    )
    assert [len(batches) for batches in second.batches if batches] == [1, 1]
    assert torch.equal(weights_of(whole), weights_of(again))


def test_any_column_of_a_data_set_survives_a_resume(make_run, make_recorder, tmp_path):
    prompts = Listed("1+1=", "2+2=", "3+3=", "4+4=", day=date(2026, 6, 1))
    whole, again, *_ = resumed(
        make_run, make_recorder, tmp_path / "run.ckpt", at=(0, 0), trainer={"max_epochs": 1}, data={"prompts": prompts}
    )
    assert torch.equal(weights_of(whole), weights_of(again))
