"""Runs whose engine, or whose trainer, meets with an accident. Started as `python -m tests.reliability.engine_runs`."""

import json
import os
import resource
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from drpo_lightning.batch import Sampling
from drpo_lightning.callbacks import FunctionReward, SyncProbe
from drpo_lightning.datamodules import ArithmeticPrompts, RolloutDataModule
from drpo_lightning.modules import PolicyModule
from drpo_lightning.rollout import EngineError, NodeEngine, RolloutHooks, VLLMEngine
from tests.conftest import MODEL_FOLDER, scattered_reward

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class UnluckyEngine(VLLMEngine):
    """Is sent a signal in the calls that it is told, and measures how long it takes to notice.

    Args:
        accidents: `start`, `sync`, `generate` or `collect` and the number of the call (from 0) to the kind of accident,
            as in {"generate 2": "kill"}. The probe's calls of `generate` are counted, too. Kinds are those of `SIGNALS`
            and, in `generate`, `memory`: it gets no more of it, and a question that needs some.
    """

    def __init__(self, accidents, **settings):
        super().__init__(process="own", dtype="float32", enforce_eager=True, **settings)
        self.accidents = accidents
        self.num_calls = {}
        self.noticed_seconds = {}

    def _meet(self, method, call, delay):
        """Makes a call, with the accident that it is due."""
        number = self.num_calls[method] = self.num_calls.get(method, -1) + 1
        name = f"{method} {number}"
        kind = self.accidents.get(name)
        if kind is None:
            return call()
        thread = threading.Thread(target=lambda: self._strike(SIGNALS[kind], delay), daemon=True)
        thread.start()
        try:
            return call()
        except EngineError:
            thread.join()
            self.noticed_seconds[f"{name} {kind}"] = time.monotonic() - self.struck
            raise

    def _strike(self, sent, delay):
        delay()
        self.struck = time.monotonic()
        os.kill(self._remote.pid, sent)

    def start(self, model, **settings):
        def during_start():
            while self._remote is None:
                time.sleep(0.01)
            time.sleep(3)

        return self._meet("start", lambda: super(UnluckyEngine, self).start(model, **settings), during_start)

    def generate(self, *args, **settings):
        if self.accidents.get(f"generate {self.num_calls.get('generate', -1) + 1}") == "memory":
            self.num_calls["generate"] += 1
            resource.prlimit(self._remote.pid, resource.RLIMIT_AS, (2**20, 2**20))
            settings["stop_token_ids"] = [1] * 2**24
            return super().generate(*args, **settings)
        heartbeat = self._remote._heartbeat
        before = heartbeat.count

        def second_token():
            while heartbeat.count < before + 2:
                time.sleep(1e-4)

        return self._meet("generate", lambda: super(UnluckyEngine, self).generate(*args, **settings), second_token)

    def collect(self, numbers):
        return self._meet("collect", lambda: super(UnluckyEngine, self).collect(numbers), lambda: None)

    def load_weights(self, weights):
        half_way = threading.Event()

        def watched():
            for i, item in enumerate(weights):
                if i == 8:
                    half_way.set()
                    time.sleep(0.2)
                yield item

        return self._meet("sync", lambda: super(UnluckyEngine, self).load_weights(watched()), half_way.wait)


class Witness(Callback, RolloutHooks):
    """Says how far the run is, and may do something after a rollout."""

    def __init__(self, folder, action=None):
        self.folder = folder
        self.action = action
        self.completions = []
        self.prompts = []
        self.staleness = []

    def on_rollout_end(self, trainer, pl_module, rollout):
        self.completions.append([[c.token_ids, c.logprobs] for c in rollout.completions])
        self.prompts.append(rollout.prompt_numbers)
        self.staleness.append(rollout.staleness.tolist())
        (self.folder / f"rollout{trainer.datamodule.iteration}").touch()

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 3 and self.action:
            self.action(trainer)


def fail(trainer):
    raise LookupError("an error in a callback")


def kill_engine(trainer):
    os.kill(trainer.datamodule.engine._remote.pid, signal.SIGKILL)


ACTIONS = {"exception": fail, "kill": kill_engine}


def main(
    folder,
    accidents=(),
    num_rollouts=2,
    devices=1,
    strategy="auto",
    action=None,
    shared=False,
    max_staleness=0,
    in_flight="continue",
    **settings,
):
    """Trains, and writes what came of it into a file for each rank.

    Args:
        folder: where to.
        accidents: of the engine of each rank.
        num_rollouts: rollouts to train on.
        devices: ranks.
        strategy: `auto`, `ddp` or `fsdp2`.
        action: one of `ACTIONS`, after the third update.
        shared: whether the ranks share an engine.
        max_staleness: of the data module.
        in_flight: likewise.
        settings: of the engine.
    """
    folder = Path(folder)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    engine = UnluckyEngine(dict(enumerate(accidents)).get(rank, {}), **settings)
    data = RolloutDataModule(
        NodeEngine(engine) if shared else engine,
        ArithmeticPrompts(max_operand=9, num_validation=20),
        str(MODEL_FOLDER),
        num_prompts=4,
        group_size=4,
        num_updates=2,
        sampling=Sampling(max_tokens=8, temperature=1.5),
        max_staleness=max_staleness,
        in_flight=in_flight,
    )
    module = PolicyModule(
        str(MODEL_FOLDER), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), temperature=1.5
    )
    witness = Witness(folder, ACTIONS.get(action))
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=num_rollouts,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=[FunctionReward(scattered_reward, name="scattered"), SyncProbe(), witness],
    )
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer.fit(module, data)
    report = {
        "completions": witness.completions,
        "prompts": witness.prompts,
        "staleness": witness.staleness,
        "weights": {name: tensor.tolist() for name, tensor in module.named_weights()},
        "num_restarts": data.engine.num_restarts,
        "noticed_seconds": engine.noticed_seconds,
        "warned": [str(warning.message) for warning in warned],
    }
    (folder / f"report{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
