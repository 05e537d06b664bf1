"""An engine that fails: started again, given the weights again, asked again, on all ranks together."""

import warnings
from unittest import mock

import pytest
import torch
from torch import distributed as dist

from drpo_lightning.batch import Completion, Sampling
from drpo_lightning.rollout import EngineError, NodeEngine, RolloutEngine, TransformersEngine
from drpo_lightning.rollout.supervised import SupervisedEngine, supervised
from drpo_lightning.rollout.weights import RepeatableWeights
from tests.rollout.ranks import Ranks

SAMPLING = Sampling(max_tokens=1)


class Fragile(RolloutEngine):
    """Answers with the number that its weights hold; fails at the calls whose numbers it is given, by method.

    The first call of a method has number 0.
    """

    max_restarts = 2
    can_sleep = True

    def __init__(self, **failures):
        super().__init__()
        self.failures = failures
        self.calls = []
        self.seeds = []
        self.weight = None
        self.is_broken = False

    def _note(self, method):
        assert not self.is_broken, "used again before it was closed"
        number = self.calls.count(method)
        self.calls.append(method)
        self.is_broken = number in self.failures.get(method, ())
        if self.is_broken:
            raise EngineError(f"{method} number {number} failed")

    def check_available(self):
        pass

    @property
    def is_started(self):
        return self.weight is not None

    def start(self, model, *, seed, **_):
        self.seeds.append(seed)
        self._note("start")
        self.weight = 0

    def generate(self, prompt_ids, *_, **__):
        self._note("generate")
        assert self.weight, "without the trainer's weights"
        return [[Completion([self.weight], [0.0], "length")] for _ in prompt_ids]

    def load_weights(self, weights):
        for i, (_, tensor) in enumerate(weights):
            if i == 0:
                self._note("load_weights")
            self.weight = int(tensor)

    def load_adapter(self, config, weights):
        self.load_weights(weights)

    def _sleep(self):
        self._note("sleep")

    def _wake(self):
        self._note("wake")

    def close(self):
        self.calls.append("close")
        self.weight, self.is_broken = None, False


class Weights:
    """Gathered by all ranks together, as sharded ones are."""

    def __init__(self, value):
        self.value = value
        self.num_gathered = 0

    def __iter__(self):
        assert not torch.is_inference_mode_enabled()
        self.num_gathered += 1
        for name in "ab":
            if dist.is_initialized():
                dist.barrier()
            yield name, torch.tensor(float(self.value))


def start(engine):
    engine.start("model", device=torch.device("cpu"), num_ranks=4, seed=5)
    return engine


def generate(engine):
    return [group[0].token_ids[0] for group in engine.generate([[1], [2]], SAMPLING, num_samples=1, stop_token_ids=[])]


def rollout(engine, value):
    """One rollout of an engine: the number that its weights held."""
    engine.wake() if engine.is_started else start(engine)
    engine.load_weights(weights := Weights(value))
    numbers = generate(engine)
    engine.sleep()
    return numbers, weights.num_gathered


@pytest.fixture(autouse=True)
def warned():
    """What is warned of."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield warned


@pytest.mark.parametrize(
    ("failures", "gathered"),
    [
        ({}, [1, 1, 1]),
        ({"generate": [1]}, [1, 2, 1]),
        ({"load_weights": [1]}, [1, 2, 1]),
        ({"wake": [0]}, [1, 2, 1]),
        ({"sleep": [0]}, [1, 2, 1]),
        ({"generate": [1], "start": [1]}, [1, 3, 1]),
        ({"generate": [1, 2], "load_weights": [4]}, [1, 3, 2]),
    ],
    ids=str,
)
def test_every_rollout_is_sampled_with_the_current_weights_whatever_fails(failures, gathered, warned):
    engine = SupervisedEngine(Fragile(**failures))
    assert [rollout(engine, value) for value in (1, 2, 3)] == [([i, i], n) for i, n in enumerate(gathered, start=1)]
    num_failures = sum(map(len, failures.values()))
    assert engine.engine.num_restarts == num_failures
    assert engine.engine.calls.count("start") == engine.engine.calls.count("close") + 1 == num_failures + 1
    messages = [str(warning.message) for warning in warned]
    assert sum("failed\nThe engine is started again (" in message for message in messages) == num_failures
    assert any("has the current weights again after 0.0 s" in message for message in messages) == bool(failures)


def test_failures_in_a_row_end_the_run_with_the_last_of_them():
    engine = SupervisedEngine(Fragile(generate=range(1, 10)))
    rollout(engine, 1)
    with pytest.raises(EngineError, match="failed 3 times in a row; at last generate number 3 failed"):
        rollout(engine, 2)


def test_failures_that_are_not_in_a_row_never_end_it():
    engine = SupervisedEngine(Fragile(generate=range(0, 20, 2)))
    for value in range(1, 10):
        assert rollout(engine, value)[0] == [value, value]
    assert engine.engine.num_restarts == 9


def test_an_engine_that_has_never_come_up_ends_the_run_at_once():
    engine = SupervisedEngine(Fragile(start=[0]))
    with pytest.raises(EngineError, match=r"^start number 0 failed"):
        start(engine)
    assert engine.engine.calls == ["start"]


def test_an_engine_started_again_does_not_draw_what_it_drew_at_the_beginning():
    engine = SupervisedEngine(Fragile(generate=[0, 1]))
    rollout(engine, 1)
    assert engine.engine.seeds == [5, 9, 13]


def test_adapters_are_loaded_again():
    engine = start(SupervisedEngine(Fragile(generate=[0])))
    engine.load_adapter({}, Weights(7))
    assert generate(engine) == [7, 7]


def test_weights_are_not_gathered_in_inference_mode():
    engine = start(SupervisedEngine(Fragile(generate=[0])))
    engine.load_weights(Weights(7))
    with torch.inference_mode():
        assert generate(engine) == [7, 7]


def test_an_error_of_another_kind_is_none_of_the_engines():
    def unreadable():
        yield "a", torch.tensor(1.0)
        raise LookupError("no second tensor")

    engine = start(SupervisedEngine(Fragile()))
    with pytest.raises(LookupError, match="no second tensor"):
        engine.load_weights(RepeatableWeights(unreadable))
    with pytest.raises(AssertionError, match="once only"):
        engine.load_weights(unreadable())


def test_an_engine_that_cannot_be_restarted_is_used_as_it_is():
    engine = TransformersEngine()
    assert supervised(engine) is engine
    assert supervised(NodeEngine(engine)).max_restarts == 0
    assert isinstance(supervised(NodeEngine(Fragile())), SupervisedEngine)


# ---------------------------------------------------------------- several ranks


@pytest.fixture(scope="module")
def all_ranks(tmp_path_factory):
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def three_rollouts(failures_of_ranks, hosts=None):
    """On each rank what `rollout` gives, and how often its engine was started."""
    inner = Fragile(**failures_of_ranks[dist.get_rank()])
    engine = SupervisedEngine(NodeEngine(inner) if hosts else inner)
    with mock.patch("socket.gethostname", return_value=hosts[dist.get_rank()] if hosts else ""):
        results = [rollout(engine, value) for value in (1, 2, 3)]
    return [numbers for numbers, _ in results], [num for _, num in results], inner.calls.count("start")


def test_all_ranks_take_part_in_the_restart_of_one(all_ranks):
    results = all_ranks(three_rollouts, [{}, {"generate": [1], "start": [1]}, {"load_weights": [2]}])
    numbers = [[1, 1], [2, 2], [3, 3]]
    gathered = [1, 3, 2]
    assert results == [(numbers, gathered, 1), (numbers, gathered, 3), (numbers, gathered, 2)]


def test_the_engine_of_one_machine_is_restarted_by_its_ranks_alone(all_ranks):
    results = all_ranks(three_rollouts, [{"generate": [1]}, {}, {"sleep": [1]}], ("here", "here", "there"))
    numbers = [[1, 1], [2, 2], [3, 3]]
    gathered = [1, 2, 2]
    assert results == [(numbers, gathered, 2), (numbers, gathered, 0), (numbers, gathered, 2)]


def test_what_ends_the_run_ends_it_on_every_rank(all_ranks):
    errors = all_ranks(three_rollouts, [{}, {}, {"generate": range(9)}])
    assert len({str(error) for error in errors}) == 1
    assert "failed 3 times in a row; at last the engine of rank 2: generate number 2 failed" in str(errors[0])
    first = all_ranks(three_rollouts, [{}, {"start": [0]}, {}])
    assert [str(error) for error in first] == [
        "the engine of rank 1: start number 0 failed",
        "start number 0 failed",
        "the engine of rank 1: start number 0 failed",
    ]
