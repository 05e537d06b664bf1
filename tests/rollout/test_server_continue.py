"""Requests that go on over a sync, on small servers that misbehave; tests/reliability/test_server_continue.py has real
ones."""

import time

import pytest
import torch

from drpo_lightning.batch import Sampling
from drpo_lightning.rollout import VLLMServerEngine
from drpo_lightning.rollout.engine import Request
from drpo_lightning.rollout.supervised import SupervisedEngine
from tests.rollout.test_server import PROMPTS, WEIGHTS, doubles, expected, generate, token_ids  # noqa: F401
from tests.rollout.test_server_ahead import answers, load, lose_all, recover, wait_until

SAMPLING = Sampling(max_tokens=6, temperature=1.5)
UNDISTURBED = {"servers": 2, "lost_servers": 0, "retried_requests": 0}


@pytest.fixture
def make_engine(doubles):  # noqa: F811
    """Engines with weights of number 3."""
    made = []

    def make(urls=None, **settings):
        settings = {"start_timeout_seconds": 0.1, "stall_timeout_seconds": 0.4} | settings
        engine = VLLMServerEngine(urls or [server.url for server in doubles], **settings)
        made.append(engine)
        engine.sample_ahead("continue")
        engine.start("model", device=torch.device("cpu"), num_ranks=1, seed=0)
        load(engine, 3)
        return engine

    yield make
    for engine in made:
        engine.close()


def requests(numbers):
    return [Request(i, PROMPTS[i], SAMPLING, 2, [1], seed=100 + i) for i in numbers]


def right(versions):
    """What requests give, by number, and the numbers of their weights."""
    tokens = {i: [[(100 + i + n + place) % 50 + 2 for place in range(6)] for n in range(2)] for i in versions}
    return tokens, {i: {version} for i, version in versions.items()}


def begin(engine, servers, numbers, seconds=1.2):
    """Asks for prompts, and waits until each of the servers has drawn a token of one and not all."""
    for server in servers:
        server.seconds, server.num_tokens = seconds, 0
    engine.submit(requests(numbers))
    wait_until(lambda: all(server.num_tokens for server in servers))


def asked(servers):
    return [path for server in servers for path, _ in server.requests].count("/inference/v1/generate")


def test_what_is_in_flight_goes_on_with_the_new_weights_and_a_sync_does_not_wait_for_it(make_engine, doubles):  # noqa: F811
    engine = make_engine()
    begin(engine, doubles, range(4))
    started = time.monotonic()
    load(engine, 4)
    assert time.monotonic() - started < 0.6
    assert engine.finished() == {}
    assert answers(engine.collect(range(4))) == right(dict.fromkeys(range(4), 3))
    for server in doubles:
        assert server.pause_modes == ["abort", "keep"]
        assert server.versions == [server.version] * 2
    assert asked(doubles) == 4
    assert engine.statistics == UNDISTURBED


def test_completions_may_outlive_several_syncs(make_engine, doubles):  # noqa: F811
    engine = make_engine()
    begin(engine, doubles, range(2))
    for version in (3, 4, 5):  # the first of them as at a validation
        load(engine, version)
        time.sleep(0.3)
    assert answers(engine.collect(range(2))) == right({0: 3, 1: 3})
    assert engine.statistics == UNDISTURBED


def test_what_no_server_has_yet_waits_for_the_end_of_the_sync_and_is_of_the_new_weights(make_engine, doubles):  # noqa: F811
    server = doubles[0]
    engine = make_engine([server.url], max_concurrency=1)
    begin(engine, [server], range(3), seconds=0.3)
    server.misbehave = lambda handler, path: path == "/server_info" and bool(time.sleep(0.6))
    load(engine, 4)
    paths = [path for path, _ in server.requests]
    begun = len(paths) - 1 - paths[::-1].index("/server_info")
    assert "/inference/v1/generate" not in paths[begun : begun + paths[begun:].index("/resume")]
    assert answers(engine.collect(range(3))) == right({0: 3, 1: 4, 2: 4})
    assert engine.num_retried_requests == 0


def test_a_pause_is_no_stall(make_engine, doubles):  # noqa: F811
    engine = make_engine()
    begin(engine, doubles, range(2), seconds=0.6)
    doubles[1].misbehave = lambda handler, path: path == "/update_weights" and bool(time.sleep(1.5))
    load(engine, 4)
    assert answers(engine.collect(range(2))) == right({0: 3, 1: 3})
    assert engine.statistics == UNDISTURBED


def test_a_server_that_hangs_after_a_sync_is_lost_and_the_other_asked(make_engine, doubles):  # noqa: F811
    engine = make_engine()
    begin(engine, doubles, range(2))
    load(engine, 4)
    doubles[0].may_compute.clear()
    with pytest.warns(RuntimeWarning, match=r"made no progress for 0\.4 s"):
        assert answers(engine.collect(range(2))) == right({0: 4, 1: 3})
    doubles[0].may_compute.set()
    assert engine.statistics == {"servers": 1, "lost_servers": 1, "retried_requests": 1}


def test_the_requests_of_a_server_that_is_lost_in_the_sync_go_to_the_others_and_end_there(make_engine, doubles):  # noqa: F811
    engine = make_engine()
    begin(engine, doubles, range(2))
    doubles[1].misbehave = lambda handler, path: path == "/update_weights" and (handler.say("no", 500) or True)
    with pytest.warns(RuntimeWarning, match="left alone"):
        load(engine, 4)
    assert answers(engine.collect(range(2))) == right({0: 3, 1: 4})
    assert engine.statistics == {"servers": 1, "lost_servers": 1, "retried_requests": 1}
    assert doubles[1].active == 1  # paused
    doubles[1].misbehave = lambda handler, path: False
    with pytest.warns(RuntimeWarning, match="is back"):
        load(engine, 5)
    assert doubles[1].pause_modes == ["abort", "keep", "abort"]
    wait_until(lambda: doubles[1].active == 0)
    assert token_ids(generate(engine)) == expected()


def test_a_request_that_fails_in_a_sync_costs_no_server_that_is_well(make_engine, doubles):  # noqa: F811
    engine = make_engine()
    left = [1]

    def fail_in_sync(handler, path):
        if path.endswith("generate") and left:
            left.pop()
            wait_until(lambda: doubles[0].is_open)
            handler.say("no", 500)
            return True
        return path == "/update_weights" and bool(time.sleep(0.5))

    doubles[0].misbehave = fail_in_sync
    engine.submit(requests([0]))
    wait_until(lambda: not left)
    load(engine, 4)
    assert answers(engine.collect([0])) == right({0: 4})
    assert engine.statistics == {"servers": 2, "lost_servers": 0, "retried_requests": 1}


def test_a_server_that_has_older_weights_than_it_was_given_is_lost(make_engine, doubles):  # noqa: F811
    engine = make_engine()
    old = doubles[0].version
    load(engine, 4)
    doubles[0].version = old
    engine.submit(requests(range(4)))
    with pytest.warns(RuntimeWarning, match=rf"it sampled with weights \['{old}'\] instead of"):
        assert answers(engine.collect(range(4))) == right(dict.fromkeys(range(4), 4))
    assert engine.num_lost_servers == 1


def test_a_server_that_keeps_what_it_has_computed_with_old_weights_is_left_out(make_engine, doubles):  # noqa: F811
    engine = make_engine()
    begin(engine, doubles, range(2))
    doubles[0].misbehave = lambda handler, path: path == "/pause" and not handler.query.pop("clear_cache")
    with pytest.warns(RuntimeWarning, match="could not reset its prefix cache"):
        load(engine, 4)
    assert answers(engine.collect(range(2))) == right({0: 4, 1: 3})


def test_a_sync_that_finds_the_servers_again_asks_again_what_has_failed(make_engine, doubles):  # noqa: F811
    engine = make_engine()
    lose_all(doubles)
    engine.submit(requests([0, 1, 2]))
    wait_until(lambda: engine.statistics["servers"] == 0)
    recover(doubles)
    with pytest.warns(RuntimeWarning, match="left alone"), pytest.warns(RuntimeWarning, match="is back"):
        load(engine, 4)
    assert answers(engine.collect([0, 1, 2])) == right({0: 4, 1: 4, 2: 4})


def test_what_is_waited_for_is_of_the_newest_weights_alone(make_engine, doubles):  # noqa: F811
    engine = make_engine()
    begin(engine, doubles, range(2))
    load(engine, 4)
    groups = generate(engine)
    assert token_ids(groups) == expected()
    assert {completion.weights_version for group in groups for completion in group} == {None}
    assert answers(engine.collect(range(2))) == right({0: 3, 1: 3})


def test_a_trainer_that_ends_in_a_sync_leaves_no_server_paused_for_the_next(make_engine, doubles):  # noqa: F811
    first = make_engine()
    begin(first, doubles, range(4), seconds=1.8)

    def breaks_off():
        yield from list(WEIGHTS.items())[:1]
        raise LookupError("the trainer ends here")

    with pytest.raises(LookupError, match="the trainer ends here"):
        first.load_weights(breaks_off())
    first.close()
    assert [server.pause_mode for server in doubles] == ["keep", "keep"]
    assert [server.active for server in doubles] == [2, 2]
    for server in doubles:
        server.seconds = 0
    second = make_engine()
    assert [server.pause_modes[-1] for server in doubles] == ["abort", "abort"]
    assert token_ids(generate(second)) == expected()
    wait_until(lambda: not any(server.active for server in doubles))


def test_a_supervised_engine_asks_again_what_was_lost_with_all_servers_in_a_sync(doubles):  # noqa: F811
    engine = SupervisedEngine(VLLMServerEngine([server.url for server in doubles], start_timeout_seconds=0.1))
    engine.sample_ahead("continue")
    engine.start("model", device=torch.device("cpu"), num_ranks=1, seed=0)
    load(engine, 3)
    begin(engine, doubles, range(4))
    left = [0, 1]
    for server in doubles:
        server.misbehave = lambda handler, path: (
            path == "/finish_weight_update" and bool(left) and (left.pop(), handler.say("no", 500))
        )
    engine.weights_version = 4
    with (
        pytest.warns(RuntimeWarning, match="left alone"),
        pytest.warns(RuntimeWarning, match="no rollout server is left"),
        pytest.warns(RuntimeWarning, match="has the current weights again"),
    ):
        engine.load_weights(Weights())
    assert answers(engine.collect(range(4))) == right(dict.fromkeys(range(4), 4))
    engine.close()


class Weights:
    """As often as they are asked for."""

    def __iter__(self):
        return iter(WEIGHTS.items())
