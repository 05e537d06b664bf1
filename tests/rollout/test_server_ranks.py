"""Ranks that use the same servers: real processes, talking by gloo."""

import time
import warnings

import pytest
import torch

from drpo_lightning.batch import Sampling
from drpo_lightning.rollout import EngineError, NodeEngine, VLLMServerEngine
from drpo_lightning.rollout.engine import Request
from drpo_lightning.rollout.supervised import SupervisedEngine
from tests.rollout.ranks import WORLD, Ranks
from tests.rollout.test_server import doubles  # noqa: F401 - a fixture

PROMPTS = [[5, 6], [7], [8, 9, 10], [11]]
SHARES = ([0, 3], [1], [])
"""Which of `PROMPTS` each rank asks for."""
SHARE_TOKENS = [
    [[[(100 + i + n + place) % 50 + 2 for place in range(2)] for n in range(2)] for i in share] for share in SHARES
]
"""What they get."""
STATE = {}
"""Of a rank."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


def rank():
    return torch.distributed.get_rank()


class Weights:
    """Two, as often as they are asked for."""

    def __iter__(self):
        for name in ("a", "b"):
            STATE["taken"] += 1
            yield name, torch.ones(3)


def start(urls, settings=(), wrap=None, in_flight="drop"):
    """Makes and starts an engine in each rank."""
    if "engine" in STATE:
        STATE["engine"].close()
    engine = VLLMServerEngine(urls, start_timeout_seconds=0.1, **dict(settings))
    engine.sample_ahead(in_flight)
    STATE["engine"] = engine = wrap(engine) if wrap else engine
    engine.start("model", device=torch.device("cpu"), num_ranks=WORLD, seed=rank())
    return engine.dtype_name


def load():
    """Loads weights; how many of them this rank took."""
    STATE["taken"] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        STATE["engine"].load_weights(Weights())
    return taken()


def num_restarts():
    return STATE["engine"].engine.num_restarts


def taken():
    return STATE["taken"]


def generate():
    """The tokens of this rank's share."""
    share = SHARES[rank()]
    groups = STATE["engine"].generate(
        [PROMPTS[i] for i in share],
        Sampling(max_tokens=2),
        num_samples=2,
        stop_token_ids=[1],
        seeds=[100 + i for i in share],
    )
    return [[completion.token_ids for completion in group] for group in groups]


def submit():
    """Asks for this rank's share."""
    STATE["engine"].submit(
        [Request(i, PROMPTS[i], Sampling(max_tokens=2), 2, [1], seed=100 + i) for i in SHARES[rank()]]
    )


def load_in_turn(version):
    """Loads weights; the second rank comes late."""
    time.sleep(rank() == 1)
    STATE["engine"].weights_version = version
    return load()


def collect():
    """The tokens of this rank's share, and the numbers of their weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = STATE["engine"].collect(SHARES[rank()])
    tokens = [[completion.token_ids for completion in groups[i]] for i in SHARES[rank()]]
    return tokens, {completion.weights_version for group in groups.values() for completion in group}


def statistics():
    return STATE["engine"].statistics


def test_each_rank_gets_its_share_and_the_weights_are_sent_once(ranks, doubles):  # noqa: F811
    assert ranks(start, [server.url for server in doubles]) == ["float32"] * WORLD
    assert ranks(load) == [2] * WORLD
    assert ranks(generate) == SHARE_TOKENS
    for server in doubles:
        assert [path for path, _ in server.requests].count("/finish_weight_update") == 1
        assert set(server.versions) <= {server.version}


def test_a_failure_of_one_rank_is_raised_on_each_and_they_go_on_together(ranks, doubles):  # noqa: F811
    ranks(start, [server.url for server in doubles], {"max_retries": 0})
    ranks(load)
    left = [1]

    def fail_once(handler, path):
        return path == "/inference/v1/generate" and left and (left.pop(), handler.say("no", 500))

    doubles[0].misbehave = fail_once
    failures = ranks(generate)
    assert all(isinstance(failure, EngineError) for failure in failures)
    assert all("failed 1 times" in str(failure) for failure in failures)
    assert [str(failure).startswith("rank ") for failure in failures].count(False) == 1
    assert ranks(load) == [2] * WORLD
    assert [len(groups) for groups in ranks(generate)] == [len(share) for share in SHARES]


def test_ranks_that_lose_no_server_learn_in_the_sync_who_is_lost(ranks, doubles):  # noqa: F811
    ranks(start, [server.url for server in doubles])
    doubles[1].misbehave = lambda handler, path: path == "/update_weights" and (handler.say("no", 500) or True)
    assert ranks(load) == [2] * WORLD
    assert [found["servers"] for found in ranks(statistics)] == [1] * WORLD
    ranks(generate)
    assert not doubles[1].versions


def test_a_sync_that_fails_takes_the_weights_of_every_rank_to_their_end(ranks, doubles):  # noqa: F811
    ranks(start, [server.url for server in doubles])
    for server in doubles:
        server.misbehave = lambda handler, path: path == "/update_weights" and (handler.say("no", 500) or True)
    assert all("no rollout server is left" in str(failure) for failure in ranks(load))
    assert ranks(taken) == [2] * WORLD


def test_weights_change_when_no_rank_has_requests_in_flight_and_each_begins_its_own_anew(ranks, doubles):  # noqa: F811
    ranks(start, [server.url for server in doubles])
    ranks(load_in_turn, 3)
    for server in doubles:
        server.seconds = 0.5
    ranks(submit)
    ranks(load_in_turn, 4)
    assert ranks(collect) == list(zip(SHARE_TOKENS, ({4}, {3}, set()), strict=True))
    undisturbed = {"servers": 2, "lost_servers": 0, "retried_requests": 0}
    assert ranks(statistics) == [undisturbed] * WORLD


def test_requests_of_every_rank_go_on_over_a_sync_also_if_answered_before_the_rank_knows_its_end(ranks, doubles):  # noqa: F811
    ranks(start, [server.url for server in doubles], {"stall_timeout_seconds": 1.2}, None, "continue")
    ranks(load_in_turn, 3)
    for server in doubles:
        server.seconds = 1.6
    ranks(submit)  # of the two tokens one is drawn before the sync, which waits for the late rank
    doubles[1].misbehave = lambda handler, path: path in ("/update_weights", "/resume") and bool(time.sleep(2))
    ranks(load_in_turn, 4)
    assert ranks(collect) == list(zip(SHARE_TOKENS, ({3}, {3}, set()), strict=True))
    assert all(server.versions.count(server.version) == len(server.versions) for server in doubles)
    assert sum(path.endswith("generate") for server in doubles for path, _ in server.requests) == 3
    undisturbed = {"servers": 2, "lost_servers": 0, "retried_requests": 0}
    assert ranks(statistics) == [undisturbed] * WORLD


def test_requests_of_every_rank_leave_a_server_that_the_first_rank_loses_in_a_sync(ranks, doubles):  # noqa: F811
    ranks(start, [server.url for server in doubles], {}, None, "continue")
    ranks(load_in_turn, 3)
    for server in doubles:
        server.seconds = 1.6
    ranks(submit)
    doubles[0].misbehave = lambda handler, path: path == "/update_weights" and (handler.say("no", 500) or True)
    ranks(load_in_turn, 4)
    assert ranks(collect) == list(zip(SHARE_TOKENS, ({3, 4}, {4}, set()), strict=True))
    assert [found["servers"] for found in ranks(statistics)] == [1] * WORLD


def test_a_failure_of_what_one_rank_collects_is_raised_on_each(ranks, doubles):  # noqa: F811
    ranks(start, [server.url for server in doubles], {"max_retries": 0})
    ranks(load)
    left = [1]

    def fail_once(handler, path):
        return path == "/inference/v1/generate" and left and (left.pop(), handler.say("no", 500))

    doubles[0].misbehave = doubles[1].misbehave = fail_once
    assert ranks(submit) == [None] * WORLD
    failures = ranks(collect)
    assert all("failed 1 times" in str(failure) for failure in failures)
    assert [str(failure).startswith("rank ") for failure in failures].count(False) == 1


def test_when_one_rank_fails_all_start_again_and_ask_again(ranks, doubles):  # noqa: F811
    ranks(start, [server.url for server in doubles], {"max_retries": 0}, SupervisedEngine)
    ranks(load_in_turn, 3)
    left = [1]

    def fail_once(handler, path):
        return path == "/inference/v1/generate" and left and (left.pop(), handler.say("no", 500))

    doubles[0].misbehave = doubles[1].misbehave = fail_once
    ranks(submit)
    assert ranks(collect) == list(zip(SHARE_TOKENS, ({3}, {3}, set()), strict=True))
    assert ranks(num_restarts) == [1] * WORLD
    assert [path for path, _ in doubles[0].requests].count("/finish_weight_update") == 2


def test_it_is_not_for_node_engine():
    with pytest.raises(ValueError, match="`VLLMServerEngine` is shared by all ranks already"):
        NodeEngine(VLLMServerEngine(["http://127.0.0.1:8000"]))
