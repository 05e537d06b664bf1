"""Two real vLLM servers on the CPU: what they sample, and what becomes of a run of which one dies or hangs."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from contextlib import contextmanager
from functools import partial
from itertools import chain

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM

from drpo_lightning.batch import Sampling
from drpo_lightning.callbacks import SyncProbe
from drpo_lightning.rollout import EngineError, RolloutHooks, VLLMEngine, VLLMServerEngine
from drpo_lightning.rollout.engine import Request
from tests.conftest import MODEL_FOLDER
from tests.reliability.servers import KEY, KEY_VARIABLE, ROOT, Server
from tests.rollout.test_engines import TOLERANCE, trainer_logprobs
from tests.rollout.vllm_double import Double

pytestmark = [pytest.mark.reliability, pytest.mark.slow]

EOS = 1
PROMPTS = [[5 + i % 7, 6, 7 + i % 11, 8] for i in range(24)]
LONG_PROMPTS = [[5 + (i * j) % 60 for j in range(1, 201)] for i in range(1, 5)]
"""Longer than a block of the prefix cache."""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def all_servers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    servers = [Server(free_port(), folder / f"server{i}.log").start() for i in range(2)]
    yield servers
    for server in servers:
        server.kill()


@pytest.fixture
def servers(all_servers, monkeypatch):
    """Both, alive."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    for server in all_servers:
        if server.process.poll() is not None:
            server.start()
    for server in all_servers:
        server.signal(signal.SIGCONT)
        server.wait()
    return all_servers


@pytest.fixture
def make_engine(servers):
    made = []

    def make(**settings):
        urls = [server.url for server in servers]
        made.append(VLLMServerEngine(urls, **({"api_key_env": KEY_VARIABLE, "stall_timeout_seconds": 4} | settings)))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def start(engine):
    engine.start(str(MODEL_FOLDER), device=torch.device("cpu"), num_ranks=1, seed=0)
    return engine


@pytest.fixture(scope="module")
def reference():
    """vLLM in a process of its own, without HTTP."""
    engine = start(VLLMEngine(process="own", dtype="float32", enforce_eager=True, max_model_len=256))
    yield engine
    engine.close()


def weights(seed):
    """Those of the model, changed so that logprobs differ by whole nats."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * 0.3)
    return dict(model.state_dict())


def generate(engine, prompts=PROMPTS, num_topk=0, sampling=Sampling(max_tokens=32, temperature=1.5)):  # noqa: B008
    seeds = list(range(100, 100 + len(prompts)))
    return engine.generate(prompts, sampling, num_samples=4, stop_token_ids=[EOS], seeds=seeds, num_topk=num_topk)


def check_same(ours, theirs):
    """Bit for bit, the most likely tokens too."""
    assert ours == theirs
    for one, other in zip(chain(*ours), chain(*theirs), strict=True):
        if other.topk_ids is not None:
            assert torch.equal(one.topk_ids, other.topk_ids)
            assert torch.equal(one.topk_logprobs, other.topk_logprobs)


@pytest.mark.parametrize(
    ("num_topk", "sampling"),
    [
        (0, Sampling(max_tokens=32, temperature=1.5)),
        (3, Sampling(max_tokens=8, temperature=1.5)),
        (-1, Sampling(max_tokens=8, temperature=0.7, top_p=0.9)),
        (3, Sampling(max_tokens=8, temperature=1.5, top_k=2)),
    ],
)
def test_samples_are_those_of_an_engine_without_http_bit_for_bit(make_engine, reference, num_topk, sampling):
    engine = start(make_engine())
    for seed in (1, 2):
        for one in (engine, reference):
            one.load_weights(weights(seed).items())
        for prompts in (PROMPTS, LONG_PROMPTS):
            ours, theirs = (generate(one, prompts, num_topk, sampling) for one in (engine, reference))
            check_same(ours, theirs)


def test_both_servers_have_work(make_engine, servers):
    engine = start(make_engine())
    engine.load_weights(weights(1).items())
    before = [tokens(server) for server in servers]
    settings = {"num_samples": 4, "stop_token_ids": [EOS]}
    first, second = (engine.generate(PROMPTS, Sampling(max_tokens=8, temperature=1.5), **settings) for _ in range(2))
    assert first != second
    assert all(tokens(server) > count for server, count in zip(servers, before, strict=True))


def tokens(server):
    text = subprocess.run(
        ["curl", "-s", "-H", f"Authorization: Bearer {KEY}", f"{server.url}/metrics"], capture_output=True, text=True
    ).stdout
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:generation_tokens_total"))


def test_every_endpoint_but_health_wants_the_key(servers):
    for path in ("/weight_info", "/metrics", "/server_info", "/v1/models"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(servers[0].url + path, timeout=5)
    assert urllib.request.urlopen(f"{servers[0].url}/health", timeout=5).status == 200
    assert KEY not in servers[0].log.read_text()


class UnluckyEngine(VLLMServerEngine):
    """Does something before calls that it is told: `sync`, `submit` or `generate` and the number of the call, from 0.

    Each rollout is a sync, the probe's samples and the rollout's: the second one has `sync 1`, `generate 2` and 3.
    """

    def __init__(self, accidents, **settings):
        super().__init__(**settings)
        self.accidents = accidents
        self.num_calls = {"sync": -1, "submit": -1, "generate": -1}
        self.num_servers = []

    def _meet(self, method):
        self.num_calls[method] += 1
        for accident in self.accidents.get(f"{method} {self.num_calls[method]}", ()):
            accident()

    def load_weights(self, weights):
        self._meet("sync")
        super().load_weights(weights)
        self.num_servers.append(self.statistics["servers"])

    def submit(self, requests):
        self._meet("submit")
        super().submit(requests)

    def generate(self, *args, **settings):
        self._meet("generate")
        return super().generate(*args, **settings)


def die(server):
    """Within a second, with requests."""
    server.signal(signal.SIGSTOP)
    threading.Thread(target=lambda: (time.sleep(1), server.kill())).start()


@pytest.fixture
def train(make_run, make_recorder, servers, monkeypatch):
    """Three rollouts with a probe after each sync; what was sampled, what was learned, and the engine."""

    def train(accidents=(), **settings):
        urls = [server.url for server in servers]
        settings = {"api_key_env": KEY_VARIABLE, "stall_timeout_seconds": 4} | settings
        engine = UnluckyEngine(dict(accidents), urls=urls, **settings)
        run = make_run(
            SyncProbe(),
            recorder := make_recorder(),
            trainer={"max_epochs": 3},
            data={"engine": engine, "sampling": Sampling(max_tokens=16, temperature=1.5), "num_prompts": 16},
        )
        run.fit()
        samples = [[(c.token_ids, c.logprobs) for c in rollout.completions] for rollout in recorder.rollouts]
        return samples, {name: tensor.clone() for name, tensor in run.module.named_weights()}, engine

    return train


@contextmanager
def warned(*texts):
    """Each of some texts is in a warning of the block."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for text in texts:
        assert any(text in str(warning.message) for warning in caught), [str(warning.message) for warning in caught]


def check_same_run(harmed, unharmed):
    assert harmed[0] == unharmed[0]
    assert all(torch.equal(tensor, unharmed[1][name]) for name, tensor in harmed[1].items())


def test_a_server_is_killed_in_generate_and_comes_back(train, servers):
    unharmed = train()
    assert unharmed[2].num_servers == [2, 2, 2]
    come_back = [lambda: servers[1].start().wait()]
    with warned("left alone until the next sync", "is back, and has the current weights"):
        harmed = train({"generate 3": [partial(die, servers[1])], "sync 2": come_back})
    check_same_run(harmed, unharmed)
    engine = harmed[2]
    assert engine.num_servers == [2, 2, 2]
    assert (engine.num_lost_servers, engine.num_restarts) == (1, 0)
    assert engine.num_retried_requests >= 8


def test_a_server_hangs_in_generate_and_goes_on_later(train, servers):
    unharmed = train()
    with warned("made no progress for 4 s", "is back"):
        harmed = train(
            {
                "generate 3": [partial(servers[0].signal, signal.SIGSTOP)],
                "sync 2": [partial(servers[0].signal, signal.SIGCONT)],
            }
        )
    check_same_run(harmed, unharmed)
    assert harmed[2].num_servers == [2, 2, 2]
    assert harmed[2].num_lost_servers == 1


def test_a_server_is_killed_in_a_sync(train, servers):
    unharmed = train()
    with warned("left alone until the next sync"):
        harmed = train({"sync 1": [partial(die, servers[0])]})
    check_same_run(harmed, unharmed)
    assert harmed[2].num_servers == [2, 1, 1]


def test_a_server_that_was_started_again_samples_nothing_before_it_has_the_weights(train, servers):
    unharmed = train()
    with warned("it sampled with weights", "is back"):
        harmed = train({"generate 3": [servers[1].kill, lambda: servers[1].start().wait()]})
    check_same_run(harmed, unharmed)
    assert harmed[2].num_servers == [2, 2, 2]
    assert harmed[2].num_retried_requests > 0


def test_all_servers_die_and_one_comes_back(train, servers):
    unharmed = train()
    accidents = [*(partial(die, server) for server in servers), partial(start_later, servers[0])]
    with warned("no rollout server is left", "The engine is started again (1 of", "left alone"):
        harmed = train({"generate 3": accidents})
    check_same_run(harmed, unharmed)
    assert harmed[2].num_servers == [2, 2, 1, 1]
    assert harmed[2].num_restarts == 1


def start_later(server):
    threading.Thread(target=lambda: (server.process.wait(), server.start())).start()


def test_a_run_without_servers_ends_and_says_what_to_do(train, servers):
    with (
        warned("no rollout server is left"),
        pytest.raises(EngineError, match=r"2 of 2 rollout servers were not ready within 2 s .*`drpo serve`"),
    ):
        train({"generate 3": [partial(die, server) for server in servers]}, start_timeout_seconds=2, max_restarts=1)


def test_what_is_in_flight_at_a_sync_is_dropped_and_drawn_from_the_new_weights(make_engine):
    engine = start(make_engine())
    engine.sample_ahead("drop")
    sampling = Sampling(max_tokens=200, temperature=1.5)
    engine.load_weights(weights(1).items())
    engine.submit([Request(i, ids, sampling, 4, [], seed=100 + i) for i, ids in enumerate(PROMPTS)])
    time.sleep(0.3)
    assert engine.finished() == {}
    engine.weights_version = 1
    engine.load_weights(weights(2).items())
    groups = engine.collect(range(len(PROMPTS)))
    assert {completion.weights_version for group in groups.values() for completion in group} == {1}
    seeds = list(range(100, 100 + len(PROMPTS)))
    check_same(
        [groups[i] for i in range(len(PROMPTS))],
        engine.generate(PROMPTS, sampling, num_samples=4, stop_token_ids=[], seeds=seeds),
    )
    assert engine.statistics == {"servers": 2, "lost_servers": 0, "retried_requests": 0}


class Overlap(Callback, RolloutHooks):
    """Waits in every rollout's first update until the next rollout is sampled, and keeps what each sync has sent."""

    def __init__(self, servers):
        self.servers = servers
        self.weights, self.rollouts, self.num_servers = [], [], []

    def on_engine_refresh(self, trainer, pl_module, engine):
        self.weights.append({name: tensor.clone() for name, tensor in pl_module.named_weights()})

    def on_rollout_end(self, trainer, pl_module, rollout):
        self.rollouts.append(rollout)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx:
            return
        end = time.monotonic() + 60
        while any(map(is_busy, self.servers)):
            assert time.monotonic() < end
            time.sleep(0.1)
        time.sleep(0.5)  # the trainer has read the answers, and asked for those of a dead server again
        while any(map(is_busy, self.servers)):
            time.sleep(0.1)
        time.sleep(0.3)
        self.num_servers.append(trainer.datamodule.engine.statistics["servers"])


def is_busy(server):
    """Whether a server has requests; a stopped one, until it is dead."""
    if server.process.poll() is not None:
        return False
    try:
        lines = server.ask("/metrics", as_json=False).splitlines()
    except OSError:
        return True
    counts = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
    return any(float(line.split()[-1]) for line in lines if line.startswith(counts))


@pytest.fixture
def train_ahead(make_run, servers):
    """Four rollouts, each but the first sampled ahead, with a probe after each sync."""

    def train(accidents=()):
        settings = {"api_key_env": KEY_VARIABLE, "stall_timeout_seconds": 20}
        engine = UnluckyEngine(dict(accidents), urls=[server.url for server in servers], **settings)
        data = {"engine": engine, "max_staleness": 1, "in_flight": "drop", "num_prompts": 16}
        data["sampling"] = Sampling(max_tokens=16, temperature=1.5)
        overlap = Overlap(servers)
        make_run(SyncProbe(), overlap, trainer={"max_epochs": 4}, data=data).fit()
        return overlap, engine

    return train


def test_a_server_that_is_killed_while_nobody_waits_costs_a_run_that_samples_ahead_nothing(train_ahead, servers):
    unharmed, _ = train_ahead()
    come_back = [lambda: servers[1].start().wait()]
    with warned("left alone until the next sync", "is back, and has the current weights"):
        harmed, engine = train_ahead({"submit 1": [partial(die, servers[1])], "sync 2": come_back})
    assert [harmed.num_servers, unharmed.num_servers] == [[2, 1, 2, 2], [2] * 4]
    assert engine.statistics["lost_servers"] == 1
    assert engine.statistics["retried_requests"] > 0
    assert engine.num_restarts == 0
    policy = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()
    for number, (rollout, other) in enumerate(zip(harmed.rollouts, unharmed.rollouts, strict=True)):
        assert rollout.completions == other.completions
        assert rollout.staleness.tolist() == [min(number, 1)] * 64
        policy.load_state_dict(harmed.weights[max(number - 1, 0)])
        for prompt, completion in zip(rollout.prompt_ids, rollout.completions, strict=True):
            expected = trainer_logprobs(policy, prompt, completion, Sampling(max_tokens=16, temperature=1.5))
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=TOLERANCE)


def test_an_update_that_a_trainer_left_open_is_closed_by_the_next(make_engine, reference):
    first = start(make_engine())

    def breaks_off():
        yield from list(weights(1).items())[:7]
        raise LookupError("the trainer ends here")

    with pytest.raises(LookupError, match="the trainer ends here"):
        first.load_weights(breaks_off())
    first.close()
    second = start(make_engine())
    for engine in (second, reference):
        engine.load_weights(weights(2).items())
    check_same(generate(second), generate(reference))


def test_the_double_of_the_fast_tests_talks_as_vllm_does(servers):
    double = Double()
    for part in ("model_config", "cache_config", "weight_transfer_config"):
        real = servers[0].ask("/server_info?config_format=json")["vllm_config"][part]
        for name, value in double.config[part].items():
            assert real[name] == value or name in ("max_model_len", "seed")
    for path in ("/health", "/weight_info", "/get_world_size"):
        ours, theirs = asked(double.url + path), asked(servers[0].url + path)
        assert theirs == ours or theirs.keys() == ours.keys()
    message = {
        "token_ids": [5, 6],
        "return_token_ids": True,
        "sampling_params": {"n": 2, "seed": 3, "max_tokens": 2, "logprobs": 0, "ignore_eos": True},
    }
    ours, theirs = (asked(one.url + "/inference/v1/generate", message) for one in (double, servers[0]))
    assert_has_the_form_of(theirs, ours)
    double.close()


def asked(url, message=None):
    request = urllib.request.Request(
        url,
        None if message is None else json.dumps(message).encode(),
        {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        text = response.read().decode()
    return json.loads(text) if text else ""


def assert_has_the_form_of(whole, part):
    """All that one JSON value has is in the other, with values of the same types."""
    if isinstance(part, dict):
        for name, value in part.items():
            assert_has_the_form_of(whole[name], value)
    elif isinstance(part, list):
        for one, other in zip(whole, part, strict=False):
            assert_has_the_form_of(one, other)
    else:
        assert type(whole) is type(part)


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_the_command_line_trains_with_servers_as_with_an_engine_of_its_own(servers, tmp_path, strategy):
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    engines = {
        "VLLMServerEngine": {"urls": [server.url for server in servers], "api_key_env": KEY_VARIABLE},
        "VLLMEngine": {"process": "own", "dtype": "float32", "enforce_eager": True, "max_model_len": 256},
    }
    logged = {}
    for name, settings in engines.items():
        folder = tmp_path / name
        config["trainer"] |= {"max_epochs": 3, "check_val_every_n_epoch": 3, "default_root_dir": str(folder)}
        config["trainer"]["logger"] = {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(folder), "name": ""},
        }
        if strategy == "fsdp2":
            config["trainer"] |= {
                "accelerator": "cpu",
                "devices": 2,
                "strategy": {
                    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
                    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
                },
            }
        config["data"]["engine"] = {"class_path": f"drpo_lightning.rollout.{name}", "init_args": settings}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        result = subprocess.run(
            [sys.executable, "-m", "drpo_lightning", "fit", "--config", str(tmp_path / f"{name}.yaml")],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        for path in folder.rglob("*"):
            assert path.is_dir() or KEY.encode() not in path.read_bytes()
        assert KEY not in result.stdout + result.stderr
        (metrics,) = folder.rglob("metrics.csv")
        logged[name] = rewards(metrics)
    assert logged["VLLMServerEngine"] == logged["VLLMEngine"]
    assert len(logged["VLLMEngine"]) == 3


def rewards(file):
    """The mean reward of each rollout."""
    with file.open() as lines:
        return [float(row["reward/mean"]) for row in csv.DictReader(lines) if row.get("reward/mean")]
