"""Requests that servers answer while nobody waits, against small ones that misbehave."""

import asyncio
import gc
import threading
import time

import pytest
import torch

from drpo_lightning.batch import Sampling
from drpo_lightning.errors import SettingError
from drpo_lightning.rollout import EngineError, VLLMServerEngine
from drpo_lightning.rollout.engine import Request
from drpo_lightning.rollout.supervised import SupervisedEngine
from tests.rollout.test_server import PROMPTS, WEIGHTS, doubles, expected, fails, generate, make_engine  # noqa: F401

SAMPLING = Sampling(max_tokens=3, temperature=1.5)


def requests(numbers):
    """For the completions that `expected` has at these places."""
    return [Request(i, PROMPTS[i], SAMPLING, 2, [1], seed=100 + i) for i in numbers]


def load(engine, version):
    engine.weights_version = version
    engine.load_weights(WEIGHTS.items())


def answers(groups):
    """Token ids of each request, and the numbers of its weights."""
    tokens = {number: [c.token_ids for c in group] for number, group in groups.items()}
    return tokens, {number: {c.weights_version for c in group} for number, group in groups.items()}


def right(numbers, version):
    return {i: expected()[i] for i in numbers}, {i: {version} for i in numbers}


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def wait_until_answered(doubles, num_prompts):  # noqa: F811
    wait_until(lambda: sum(len(server.versions) for server in doubles) == num_prompts)
    time.sleep(0.1)  # what they have said is read


def blocked(server):
    """Makes a server keep its requests until the event is set."""
    event = threading.Event()
    server.misbehave = lambda handler, path: path.endswith("generate") and event.wait(20) and False
    return event


def test_requests_are_answered_while_nobody_waits(make_engine, doubles):  # noqa: F811
    engine = make_engine()
    load(engine, 7)
    engine.submit(requests(range(12)))
    wait_until_answered(doubles, 12)
    assert [len(server.versions) for server in doubles] == [6, 6]
    assert answers(engine.finished()) == right(range(12), 7)
    assert engine.finished() == {}
    assert engine.statistics == {"servers": 2, "lost_servers": 0, "retried_requests": 0}


def test_what_has_finished_is_taken_without_waiting_for_the_rest(make_engine, doubles):  # noqa: F811
    engine = make_engine([doubles[0].url])
    load(engine, 0)
    engine.submit(requests([0]))
    wait_until_answered(doubles, 1)
    event = blocked(doubles[0])
    engine.submit(requests([1]))
    started = time.monotonic()
    assert answers(engine.finished()) == right([0], 0)
    assert time.monotonic() - started < 1
    event.set()
    assert answers(engine.collect([1])) == right([1], 0)


def test_only_those_that_are_asked_for_are_waited_for(make_engine, doubles):  # noqa: F811
    engine = make_engine([doubles[0].url], max_concurrency=1)
    load(engine, 0)
    doubles[0].seconds = 0.2
    engine.submit(requests(range(12)))
    started = time.monotonic()
    assert answers(engine.collect([0, 1])) == right([0, 1], 0)
    assert time.monotonic() - started < 1.5
    assert engine.collect([]) == {}
    assert answers(engine.collect(range(2, 12))) == right(range(2, 12), 0)


def test_a_sync_begins_anew_what_is_in_flight_and_keeps_what_has_finished(make_engine, doubles):  # noqa: F811
    engine = make_engine()
    load(engine, 3)
    engine.submit(requests([0, 1]))
    wait_until_answered(doubles, 2)
    old = {server.version for server in doubles}
    events = [blocked(server) for server in doubles]
    engine.submit(requests([2, 3]))
    wait_until(lambda: sum(path.endswith("generate") for server in doubles for path, _ in server.requests) == 4)
    threading.Timer(0.5, lambda: [event.set() for event in events]).start()
    load(engine, 4)
    tokens, versions = answers(engine.collect([0, 1, 2, 3]))
    assert tokens == right([0, 1, 2, 3], 0)[0]
    assert versions == {0: {3}, 1: {3}, 2: {4}, 3: {4}}
    assert not old & {server.version for server in doubles}
    assert engine.statistics == {"servers": 2, "lost_servers": 0, "retried_requests": 0}


def test_answers_of_other_weights_are_not_used(make_engine, doubles):  # noqa: F811
    engine = make_engine()
    load(engine, 0)
    doubles[0].version = "default"  # as if it had been started again
    engine.submit(requests(range(12)))
    with pytest.warns(RuntimeWarning, match=r"it sampled with weights \['default'\] instead of"):
        assert answers(engine.collect(range(12))) == right(range(12), 0)
    assert engine.num_lost_servers == 1


@pytest.mark.parametrize("status", [429, 500])
def test_a_failed_request_is_asked_again(make_engine, doubles, status):  # noqa: F811
    engine = make_engine()
    load(engine, 0)
    doubles[0].misbehave = fails(status, 2)
    engine.submit(requests(range(12)))
    assert answers(engine.collect(range(12))) == right(range(12), 0)
    assert engine.statistics == {"servers": 2, "lost_servers": 0, "retried_requests": 2}


def test_a_server_that_hangs_while_nobody_waits_is_lost_and_the_other_asked(make_engine, doubles):  # noqa: F811
    engine = make_engine()
    load(engine, 0)
    event = blocked(doubles[0])
    engine.submit(requests(range(12)))
    wait_until_answered(doubles[1:], 12)
    with pytest.warns(RuntimeWarning, match=rf"{doubles[0].url} made no progress for 0\.4 s .* left alone"):
        assert answers(engine.collect(range(12))) == right(range(12), 0)
    event.set()
    assert engine.statistics == {"servers": 1, "lost_servers": 1, "retried_requests": 6}


def lose_all(doubles):  # noqa: F811
    for server in doubles:
        server.misbehave = lambda handler, path: handler.connection.close() or True


def recover(doubles):  # noqa: F811
    for server in doubles:
        server.misbehave = lambda handler, path: False


def test_that_no_server_is_left_is_told_where_completions_are_collected(make_engine, doubles):  # noqa: F811
    engine = make_engine()
    load(engine, 0)
    lose_all(doubles)
    engine.submit(requests([0, 1, 2]))
    wait_until(lambda: engine.statistics["servers"] == 0)
    engine.submit(requests([3]))
    assert engine.finished() == {}
    with (
        pytest.warns(RuntimeWarning, match="left alone"),
        pytest.raises(EngineError, match="no rollout server is left"),
    ):
        engine.collect([0])


def test_a_sync_that_finds_the_servers_again_asks_again_what_has_failed(make_engine, doubles):  # noqa: F811
    engine = make_engine()
    load(engine, 0)
    lose_all(doubles)
    engine.submit(requests([0, 1, 2]))
    wait_until(lambda: engine.statistics["servers"] == 0)
    recover(doubles)
    with pytest.warns(RuntimeWarning, match="left alone"), pytest.warns(RuntimeWarning, match="is back"):
        load(engine, 1)
    assert answers(engine.collect([0, 1, 2])) == right([0, 1, 2], 1)


def test_a_request_that_is_refused_is_the_error_of_who_collects_it(make_engine, doubles):  # noqa: F811
    engine = make_engine()
    load(engine, 0)
    for server in doubles:
        server.misbehave = fails(400, 1)
    engine.submit(requests([0]))
    with pytest.raises(SettingError, match="status 400"):
        engine.collect([0])


def test_waiting_too_long_is_an_error(make_engine, doubles):  # noqa: F811
    engine = make_engine(generate_timeout_seconds=0.3, stall_timeout_seconds=60.0)
    load(engine, 0)
    for server in doubles:
        server.seconds = 5
    engine.submit(requests([0]))
    with pytest.raises(EngineError, match=r"within 0\.3 s \(`generate_timeout_seconds`\)"):
        engine.collect([0])


def test_a_supervised_engine_asks_again_what_was_lost_with_all_servers(doubles):  # noqa: F811
    engine = SupervisedEngine(VLLMServerEngine([server.url for server in doubles], start_timeout_seconds=0.1))
    engine.start("model", device=torch.device("cpu"), num_ranks=1, seed=0)
    engine.weights_version = 5
    engine.load_weights(WEIGHTS.items())
    engine.submit(requests([0, 1]))
    wait_until_answered(doubles, 2)
    assert answers(engine.finished()) == right([0, 1], 5)
    lose_all(doubles)
    engine.submit(requests(range(2, 12)))
    wait_until(lambda: engine.engine.statistics["servers"] == 0)
    recover(doubles)
    with (
        pytest.warns(RuntimeWarning, match="left alone"),
        pytest.warns(RuntimeWarning, match="no rollout server is left"),
        pytest.warns(RuntimeWarning, match="has the current weights again"),
    ):
        assert answers(engine.collect(range(2, 6))) == right(range(2, 6), 5)
    assert answers(engine.collect(range(6, 12))) == right(range(6, 12), 5)
    assert engine.engine.num_restarts == 1
    engine.close()


def test_what_somebody_waits_for_goes_before_what_nobody_waits_for(make_engine, doubles):  # noqa: F811
    engine = make_engine([doubles[0].url], max_concurrency=1)
    load(engine, 0)
    doubles[0].seconds = 0.1
    engine.submit(requests(range(12)))
    generate(engine, PROMPTS[:3])
    assert len(doubles[0].versions) <= 5
    assert answers(engine.collect(range(12))) == right(range(12), 0)


def test_closing_leaves_nothing_behind(make_engine, doubles, caplog):  # noqa: F811
    engine = make_engine()
    load(engine, 0)
    events = [blocked(server) for server in doubles]
    engine.submit(requests(range(12)))
    wait_until(lambda: any(path.endswith("generate") for server in doubles for path, _ in server.requests))
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 2
    assert not [thread for thread in threading.enumerate() if thread.name == "rollout-servers"]
    assert not [task for task in gc.get_objects() if issubclass(type(task), asyncio.Task) and not task.done()]
    assert not caplog.text
    for event in events:
        event.set()
