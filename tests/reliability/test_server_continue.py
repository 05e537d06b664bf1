"""Two real vLLM servers that keep their requests while they get other weights: what the tokens are of."""

import json
import time
import urllib.request

import pytest
import torch
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM

from drpo_lightning.batch import Sampling
from drpo_lightning.callbacks import SyncProbe
from drpo_lightning.rollout import RolloutHooks, VLLMServerEngine
from drpo_lightning.rollout.engine import Request
from drpo_lightning.rollout.server import client
from tests.conftest import MODEL_FOLDER
from tests.reliability.servers import KEY, KEY_VARIABLE
from tests.reliability.test_server import (  # noqa: F401
    LONG_PROMPTS,
    PROMPTS,
    all_servers,
    make_engine,
    servers,
    start,
    weights,
)
from tests.rollout.test_engines import TOLERANCE, trainer_logprobs

pytestmark = [pytest.mark.reliability, pytest.mark.slow]
UNDISTURBED = {"servers": 2, "lost_servers": 0, "retried_requests": 0}


@pytest.fixture
def spans(monkeypatch):
    """Of completions, by `key`: which syncs, counted from 1, the tokens from one place to another are of."""
    found = {}
    original = client.completions_in

    def recorded(answer, *arguments):
        completions = original(answer, *arguments)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        for completion, choice in zip(completions, choices, strict=True):
            parts = choice["weight_versions"]
            assert [part["start"] for part in parts] == [0, *(part["end"] for part in parts[:-1])]
            assert parts[-1]["end"] == len(completion.token_ids)
            found[key(answer["prompt_token_ids"], completion)] = [
                (int(part["version"].rpartition("-")[2]), part["start"], part["end"]) for part in parts
            ]
        return completions

    monkeypatch.setattr(client, "completions_in", recorded)
    return found


def key(prompt, completion):
    return tuple(prompt), *completion.token_ids, *completion.logprobs


def num_aborted(servers):  # noqa: F811
    """Completions that servers have given up."""
    lines = [line for server in servers for line in server.ask("/metrics", as_json=False).splitlines()]
    counts = (line for line in lines if line.startswith("vllm:request_success_total") and '"abort"' in line)
    return sum(float(line.split()[-1]) for line in counts)


@pytest.fixture
def policy():
    return AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()


def check_logprobs(policy, prompt, completion, parts, weights_of, sampling):
    """Each token's logprob is that of the weights that its span names; the number of these syncs."""
    for sync, first, end in parts:
        policy.load_state_dict(weights_of[sync])
        of_these = trainer_logprobs(policy, prompt, completion, sampling)[first:end]
        torch.testing.assert_close(torch.tensor(completion.logprobs[first:end]), of_these, rtol=0, atol=TOLERANCE)
    return len(parts)


def test_each_token_is_drawn_with_exactly_the_weights_that_its_span_names(make_engine, servers, spans, policy):  # noqa: F811
    engine = make_engine()
    engine.sample_ahead("continue")
    start(engine)
    aborted = num_aborted(servers)
    long, short = Sampling(max_tokens=50, temperature=1.5), Sampling(max_tokens=200, temperature=1.5)
    requests = [
        Request(i, ids, long if len(ids) > 100 else short, 4, [], seed=100 + i if i % 2 else None)
        for i, ids in enumerate([*PROMPTS, *LONG_PROMPTS])
    ]
    weights_of = {sync: weights(sync) for sync in (1, 2, 3, 4)}
    first, rest = requests[::2], requests[1::2]
    for sync, asked in ((1, first), (2, rest), (3, []), (4, [])):
        engine.weights_version = 10 + sync
        engine.load_weights(weights_of[sync].items())
        engine.submit(asked)
        time.sleep(0.4)
    groups = engine.collect(range(len(requests)))
    assert engine.statistics == UNDISTURBED
    assert num_aborted(servers) == aborted
    counts = []
    for request in requests:
        for completion in groups[request.number]:
            parts = spans[key(request.prompt_ids, completion)]
            counts.append(check_logprobs(policy, request.prompt_ids, completion, parts, weights_of, request.sampling))
            assert completion.weights_version == 10 + parts[0][0] >= (11 if request in first else 12)
            assert completion.finish_reason == "length"
    assert sum(count > 1 for count in counts) > 20


class Rollouts(Callback, RolloutHooks):
    """Keeps what is sampled, and the weights of each sync."""

    def __init__(self):
        self.weights_of, self.rollouts = {}, []

    def on_engine_refresh(self, trainer, pl_module, engine):
        weights = {name: tensor.clone() for name, tensor in pl_module.named_weights()}
        self.weights_of[len(self.weights_of) + 1] = weights

    def on_rollout_end(self, trainer, pl_module, rollout):
        self.rollouts.append(rollout)


def test_a_run_gives_nothing_up_and_trains_on_nothing_that_is_too_old(make_run, servers, spans, policy):  # noqa: F811
    aborted = num_aborted(servers)
    engine = VLLMServerEngine([server.url for server in servers], api_key_env=KEY_VARIABLE, max_concurrency=4)
    sampling = Sampling(max_tokens=64, temperature=1.5)
    data = {"engine": engine, "max_staleness": 2, "in_flight": "continue", "num_prompts": 16, "sampling": sampling}
    kept = Rollouts()
    run = make_run(SyncProbe(), kept, trainer={"max_epochs": 6}, data=data)
    run.data.encoder.stop_token_ids = []  # completions take longer than the updates
    run.fit()
    assert (engine.num_lost_servers, engine.num_retried_requests, engine.num_restarts) == (0, 0, 0)
    assert num_aborted(servers) == aborted
    counts = []
    for number, rollout in enumerate(kept.rollouts):
        assert rollout.staleness.max() <= min(number, 2)
        for prompt, completion in zip(rollout.prompt_ids, rollout.completions, strict=True):
            parts = spans[key(prompt, completion)]
            assert all(sync - 1 >= completion.weights_version for sync, _, _ in parts)
            counts.append(check_logprobs(policy, prompt, completion, parts, kept.weights_of, sampling))
    assert max(counts) > 1
    assert max(int(rollout.staleness.max()) for rollout in kept.rollouts) == 2


def test_a_trainer_that_ends_in_a_sync_leaves_no_server_paused_for_the_next(make_engine, servers, policy):  # noqa: F811
    first = make_engine()
    first.sample_ahead("continue")
    start(first).load_weights(weights(1).items())
    sampling = Sampling(max_tokens=200, temperature=1.5)
    requests = [Request(i, ids, sampling, 4, []) for i, ids in enumerate(PROMPTS)]
    first.submit(requests)
    time.sleep(0.3)

    def breaks_off():
        yield from list(weights(2).items())[:7]
        raise LookupError("the trainer ends here")

    with pytest.raises(LookupError, match="the trainer ends here"):
        first.load_weights(breaks_off())
    assert all(server.ask("/is_paused")["is_paused"] for server in servers)
    first.close()
    second = start(make_engine())
    second.load_weights(weights(3).items())
    assert not any(server.ask("/is_paused")["is_paused"] for server in servers)
    policy.load_state_dict(weights(3))
    groups = second.generate(PROMPTS, sampling, num_samples=1, stop_token_ids=[])
    for prompt, (completion,) in zip(PROMPTS, groups, strict=True):
        expected = trainer_logprobs(policy, prompt, completion, sampling)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=TOLERANCE)
    for server in servers:
        lines = server.ask("/metrics", as_json=False).splitlines()
        left = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
        assert not sum(float(line.split()[-1]) for line in lines if line.startswith(left))


def test_a_server_that_has_not_cleared_its_cache_in_a_pause_says_so(make_engine, servers):  # noqa: F811
    engine = make_engine()
    engine.sample_ahead("continue")
    start(engine).load_weights(weights(1).items())
    for mode, is_cleared in (("keep&clear_cache=false", False), ("keep&clear_cache=true", True)):
        engine.submit([Request(i, ids, Sampling(max_tokens=200), 4, []) for i, ids in enumerate(PROMPTS)])
        time.sleep(0.3)
        ask(servers[0], f"/pause?mode={mode}")
        assert ask(servers[0], "/reset_prefix_cache")["success"] is is_cleared
        ask(servers[0], "/resume")
        engine.collect(range(len(PROMPTS)))


def ask(server, path):
    request = urllib.request.Request(server.url + path, b"", {"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.loads(response.read())
