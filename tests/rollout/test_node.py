"""Ranks that share the engine of their machine: real processes, talking by gloo."""

import os
import socket
import time
from unittest.mock import patch

import pytest
import torch
from torch import distributed as dist
from transformers import AutoModelForCausalLM

from drpo_lightning.batch import Sampling
from drpo_lightning.errors import SettingError
from drpo_lightning.rollout import EngineError, TransformersEngine
from drpo_lightning.rollout.node import NodeEngine
from tests.rollout.conftest import MODEL
from tests.rollout.ranks import WORLD, Ranks
from tests.rollout.test_engines import EOS, PROMPTS

SHARES = {
    "uneven": ([0, 1], [2], [0]),
    "empty": ([], [0, 2], [1]),
    "one_asks": ([], [2, 1, 0], []),
    "none": ([], [], []),
}
"""Which of `PROMPTS` each rank asks for."""


@pytest.fixture(scope="module")
def all_ranks():
    """The processes that were started, of which the last are in use."""
    started = []
    yield started
    for ranks in started:
        ranks.close()


@pytest.fixture
def ranks(all_ranks, tmp_path):
    if not all_ranks or not all_ranks[-1].are_alive():
        all_ranks.append(Ranks(tmp_path))
    return all_ranks[-1]


def start(engine, **arguments):
    engine.start(MODEL, device=torch.device("cpu"), num_ranks=WORLD, seed=0, **arguments)
    return engine


def node_engine(engine=None, **arguments):
    return start(NodeEngine(engine or TransformersEngine(), **arguments))


def generate(engine, numbers=range(3), *, seeded=True, sampling=Sampling(max_tokens=4, temperature=1.5), num_topk=0):  # noqa: B008
    return engine.generate(
        [PROMPTS[i] for i in numbers],
        sampling,
        num_samples=4,
        stop_token_ids=[EOS],
        seeds=[7 + i for i in numbers] if seeded else None,
        num_topk=num_topk,
    )


# ---------------------------------------------------------------- completions


def of_a_shared_engine_and_of_an_own(shares):
    # One prompt at a time: the same batches, and so the same bits, however the prompts are spread.
    shared, own = node_engine(TransformersEngine(max_batch_size=4)), start(TransformersEngine(max_batch_size=4))
    return [generate(engine, shares[dist.get_rank()], num_topk=5) for engine in (shared, own)]


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_each_rank_gets_what_an_engine_of_its_own_would_have_given(ranks, shares):
    for numbers, (shared, own) in zip(shares, ranks(of_a_shared_engine_and_of_an_own, shares), strict=True):
        assert [len(group) for group in shared] == [4] * len(numbers)
        assert shared == own
        for group, expected in zip(shared, own, strict=True):
            for completion, other in zip(group, expected, strict=True):
                assert torch.equal(completion.topk_ids, other.topk_ids)
                assert torch.equal(completion.topk_logprobs, other.topk_logprobs)


class Calls(TransformersEngine):
    """Keeps what it is asked for."""

    def __init__(self):
        super().__init__(sleep="always")
        self.calls = []

    @property
    def can_sleep(self):
        return True

    def check_sleep(self):
        pass

    def start(self, *args, **kwargs):
        self.calls.append(f"start {kwargs['adapter_rank']}")
        super().start(*args, **kwargs)

    def generate(self, prompt_ids, *args, **kwargs):
        self.calls.append(f"generate {len(prompt_ids)}")
        return super().generate(prompt_ids, *args, **kwargs)

    def load_weights(self, weights):
        self.calls.append(f"load_weights {len(dict(weights))}")

    def load_adapter(self, config, weights):
        self.calls.append(f"load_adapter {config['r']} {len(dict(weights))}")

    def _sleep(self):
        self.calls.append("sleep")

    def _wake(self):
        self.calls.append("wake")

    def close(self):
        self.calls.append("close")
        super().close()


def life_of_an_engine(hosts=("node",) * WORLD):
    with patch.object(socket, "gethostname", lambda: hosts[dist.get_rank()]):
        engine = start(NodeEngine(Calls()), adapter_rank=8)
    generate(engine, [dist.get_rank()])
    engine.load_weights([("a", torch.zeros(1)), ("b", torch.zeros(1))])
    engine.load_adapter({"r": 8}, [("a", torch.zeros(1))])
    engine.sleep()
    engine.wake()
    started = engine.is_started, engine.context_tokens, engine.dtype_name, engine.can_sleep, engine.sleep_mode
    engine.close()
    engine.close()
    return started, engine.is_started, engine.engine.calls


def test_only_the_first_rank_of_a_machine_starts_its_engine_and_uses_it(ranks):
    results = ranks(life_of_an_engine)
    for started, is_started, _ in results:
        assert started == (True, 512, "float32", True, "always")
        assert not is_started
    calls = [calls for *_, calls in results]
    assert calls[0] == [
        *("start 8", "generate 3", "load_weights 2", "load_adapter 8 1", "sleep", "wake", "close", "close")
    ]
    assert calls[1:] == [["close", "close"]] * 2


def test_each_machine_has_its_own_engine(ranks):
    results = ranks(life_of_an_engine, ("here", "there", "here"))
    assert all(started == (True, 512, "float32", True, "always") for started, *_ in results)
    assert [calls[:2] for *_, calls in results] == [["start 8", "generate 2"], ["start 8", "generate 1"], ["close"] * 2]


def test_one_process_without_a_process_group_has_the_engine_for_itself():
    engine = node_engine()
    assert generate(engine) == generate(start(TransformersEngine()))
    engine.load_weights(AutoModelForCausalLM.from_pretrained(MODEL).state_dict().items())
    engine.close()
    assert not engine.is_started


def after_other_weights():
    engine = node_engine()
    before = generate(engine)
    policy = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    engine.load_weights((name, tensor * 1.5) for name, tensor in policy.state_dict().items())
    return before, generate(engine)


def test_after_a_sync_all_ranks_generate_with_the_new_weights(ranks):
    results = ranks(after_other_weights)
    for before, after in results:
        assert after == results[0][1] != before


def disagreeing(setting):
    engine = node_engine()
    mine = dist.get_rank() == 1
    values = {"seeded": not mine, "num_topk": int(mine), "sampling": Sampling(max_tokens=4 + mine)}
    generate(engine, **{setting: values[setting]})


@pytest.mark.parametrize("setting", ["seeded", "num_topk", "sampling"])
def test_ranks_that_want_different_things_are_an_error_on_each(ranks, setting):
    for error in ranks(disagreeing, setting):
        with pytest.raises(EngineError, match="must sample in the same way"):
            raise error


def test_a_timeout_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="`timeout_seconds` must be positive, got 0"):
        NodeEngine(TransformersEngine(), timeout_seconds=0)


# ---------------------------------------------------------------- failures


class Failing(Calls):
    """Raises an error in one of its methods; while weights arrive, after the second."""

    def __init__(self, method, error):
        super().__init__()
        self.error = error
        setattr(self, method, self.fail_in_the_middle if method.startswith("load") else self.fail)

    def fail(self, *args, **kwargs):
        raise self.error

    def fail_in_the_middle(self, *args):
        for i, _ in enumerate(args[-1]):
            if i == 1:
                raise self.error


def gathered_weights(number):
    """Weights that all ranks have to take together."""
    for i in range(number):
        tensor = torch.ones(2)
        dist.all_reduce(tensor)
        yield str(i), tensor


def use_an_engine_that_fails(method, error):
    failing = Failing(method, error)
    engine = NodeEngine(failing) if method == "start" else node_engine(failing)
    calls = {
        "start": lambda: start(engine),
        "generate": lambda: generate(engine),
        "load_weights": lambda: engine.load_weights(weights),
        "load_adapter": lambda: engine.load_adapter({}, weights),
        "_sleep": engine.sleep,
        "_wake": engine.wake,
    }
    weights = gathered_weights(5)
    try:
        calls[method]()
    except (EngineError, SettingError) as caught:
        engine.close()
        # The ranks still understand each other: no collective is left over.
        dist.all_reduce(together := torch.ones(1))
        return type(caught), str(caught), method.startswith("load") and next(weights, None), together.item()


@pytest.mark.parametrize("method", ["start", "generate", "load_weights", "load_adapter", "_sleep", "_wake"])
def test_what_fails_on_the_leader_is_raised_on_each_rank(ranks, method):
    results = ranks(use_an_engine_that_fails, method, EngineError("out of order"))
    left_over = None if method.startswith("load") else False
    assert results == [(EngineError, "out of order", left_over, WORLD)] * WORLD


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (LookupError("not there"), (EngineError, "LookupError: not there")),
        (SettingError("`k` is too large"), (SettingError, "`k` is too large")),
    ],
    ids=["foreign", "setting"],
)
def test_an_error_of_another_type_says_which_and_one_of_a_setting_stays_one(ranks, error, expected):
    assert ranks(use_an_engine_that_fails, "generate", error) == [(*expected, False, WORLD)] * WORLD


def weights_that_cannot_be_gathered():
    yield from gathered_weights(2)
    raise MemoryError(f"on rank {dist.get_rank()}")


def load_weights_that_cannot_be_gathered():
    node_engine(Calls()).load_weights(weights_that_cannot_be_gathered())


def test_weights_that_cannot_be_gathered_are_each_ranks_own_error(ranks):
    results = ranks(load_weights_that_cannot_be_gathered)
    assert [(type(error), str(error)) for error in results] == [(MemoryError, f"on rank {i}") for i in range(WORLD)]


class Slow(TransformersEngine):
    def generate(self, *args, **kwargs):
        time.sleep(3)
        return super().generate(*args, **kwargs)


def wait_for_a_slow_engine(timeout_seconds):
    started = time.monotonic()
    try:
        generate(node_engine(Slow(), timeout_seconds=timeout_seconds))
    except EngineError as error:
        return str(error), time.monotonic() - started


def test_ranks_wait_for_the_leader_as_long_as_they_are_told(ranks):
    assert ranks(wait_for_a_slow_engine, 30.0) == [None] * WORLD
    for message, seconds in ranks(wait_for_a_slow_engine, 1.5)[1:]:
        assert "in `generate` another rank of this machine ended, or did not come within 1.5 s" in message
        assert seconds < 3


class Dying(TransformersEngine):
    def generate(self, *args, **kwargs):
        os._exit(3)


def lose_the_leader():
    generate(node_engine(Dying()))


def test_the_leaders_death_is_noticed_at_once(ranks):
    started = time.monotonic()
    first, *others = ranks(lose_the_leader)
    assert first == "dead"
    for error in others:
        with pytest.raises(EngineError, match="in `generate` another rank of this machine ended"):
            raise error
    assert time.monotonic() - started < 30
