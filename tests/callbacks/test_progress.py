"""The progress bar says which phase a run is in, and shows reward and speed."""

from lightning.pytorch import Callback

from drpo_lightning.callbacks import RolloutProgress, RolloutStatistics
from drpo_lightning.rollout import RolloutHooks


class Watch(Callback, RolloutHooks):
    """Reads the bar in both phases; it stands after the bar in the list of callbacks."""

    def __init__(self, bar):
        self.bar = bar
        self.descriptions = []
        self.metrics = []

    def on_engine_refresh(self, trainer, pl_module, engine):
        self.descriptions.append(self.bar.train_progress_bar.desc)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.descriptions.append(self.bar.train_progress_bar.desc)
        self.metrics.append(self.bar.get_metrics(trainer, pl_module))


def test_the_bar_names_rollout_and_phase(make_run, make_memory):
    bar = RolloutProgress()
    watch = Watch(bar)
    run = make_run(
        bar,
        watch,
        RolloutStatistics(),
        trainer={"enable_progress_bar": True, "max_epochs": 2, "logger": make_memory()},
    )
    run.fit()
    assert [text.removesuffix(": ") for text in watch.descriptions] == [
        f"Rollout {rollout}/2, {phase}" for rollout in (1, 2) for phase in ("sampling", "updating", "updating")
    ]
    assert "v_num" not in watch.metrics[0]
    assert watch.metrics[-1]["reward"] == float(run.trainer.callback_metrics["reward/mean"])
    assert watch.metrics[-1]["tok/s"] > 0
    assert "tok/s" not in watch.metrics[0]


def test_without_a_number_of_rollouts_there_is_a_question_mark(make_run):
    bar = RolloutProgress()
    watch = Watch(bar)
    make_run(bar, watch, trainer={"enable_progress_bar": True, "max_epochs": -1, "max_steps": 1}).fit()
    assert watch.descriptions[0].startswith("Rollout 1/?, sampling")
