"""The data that travels."""

import math
from dataclasses import replace

import jaxtyping
import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection

from drpo_lightning.batch import Completion, Rollout, RolloutBatch, Sampling

TENSORS = ("input_ids", "attention_mask", "completion_mask", "rollout_logprobs", "advantages")


@pytest.fixture
def unchecked_hints(monkeypatch):
    """The package as a user runs it: types of arguments are not checked by the test runner."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def rollout():
    completions = [
        Completion([5, 6, 2], [-0.1, -0.2, -0.3], "stop"),
        Completion([7], [-0.4], "length"),
        Completion([], [], "length"),
        Completion([8, 2], [-0.5, -0.6], "stop"),
    ]
    return Rollout(
        prompts=["a", "a", "b", "b"],
        prompt_ids=[[11, 12], [11, 12], [13], [13]],
        completions=completions,
        texts=["x", "y", "", "z"],
        columns={"answer": [1, 1, 2, 2]},
        group_size=2,
        rewards=torch.tensor([1.0, 0.0, 0.5, 0.25]),
    )


def collate(rows, of=rollout):
    return RolloutBatch.collate(
        of(),
        rows,
        torch.tensor([1.0, -1.0, 2.0, -2.0]),
        pad_token_id=99,
        num_update_tokens=6,
        num_update_sequences=4,
    )


def rollout_with_more():
    """The same with pi_prox, pi_ref and the top 2, whose entries tell sample, token and rank."""
    plain = rollout()

    def topk(row, length):
        places = torch.arange(length)[:, None]
        ids = 100 * row + 10 * places + torch.arange(2)
        return {"topk_ids": ids, "topk_logprobs": -ids / 1000}

    completions = [replace(c, **topk(i, len(c.token_ids))) for i, c in enumerate(plain.completions)]
    proximal = [[logprob - 1 for logprob in c.logprobs] for c in plain.completions]
    reference = [[logprob - 2 for logprob in c.logprobs] for c in plain.completions]
    return replace(
        plain,
        completions=completions,
        proximal_logprobs=proximal,
        reference_logprobs=reference,
        prompt_numbers=[4, 4, 7, 7],
    )


def square(size=3, **changes):
    tensors = {
        "input_ids": torch.ones(size, size, dtype=torch.long),
        "attention_mask": torch.ones(size, size, dtype=torch.bool),
        "completion_mask": torch.ones(size, size, dtype=torch.bool),
        "rollout_logprobs": torch.zeros(size, size),
        "advantages": torch.zeros(size, size),
    }
    sizes = {"num_update_tokens": 9, "num_update_sequences": 3, "sample_ids": torch.arange(size)}
    return RolloutBatch(**(tensors | changes), **sizes)


def test_collate_worked_by_hand():
    batch = collate([0, 1, 3])
    t, f = True, False
    assert batch.input_ids.tolist() == [[11, 12, 5, 6, 2], [11, 12, 7, 99, 99], [13, 8, 2, 99, 99]]
    assert batch.attention_mask.tolist() == [[t, t, t, t, t], [t, t, t, f, f], [t, t, t, f, f]]
    assert batch.completion_mask.tolist() == [[f, f, t, t, t], [f, f, t, f, f], [f, t, t, f, f]]
    expected = torch.tensor([[0, 0, -0.1, -0.2, -0.3], [0, 0, -0.4, 0, 0], [0, -0.5, -0.6, 0, 0]])
    assert torch.equal(batch.rollout_logprobs, expected)
    assert batch.advantages.tolist() == [[0, 0, 1, 1, 1], [0, 0, -1, 0, 0], [0, -2, -2, 0, 0]]
    assert (batch.num_update_tokens, batch.num_update_sequences) == (6, 4)


def test_collate_keeps_the_order_of_rows_and_pads_to_the_longest_of_them():
    batch = collate([3, 1])
    assert batch.input_ids.tolist() == [[13, 8, 2], [11, 12, 7]]
    assert batch.advantages.tolist() == [[0, -2, -2], [0, 0, -1]]


def test_collate_of_an_empty_completion_has_no_completion_token():
    batch = collate([2])
    assert batch.input_ids.tolist() == [[13]]
    assert batch.completion_mask.tolist() == [[False]]
    assert batch.advantages.tolist() == batch.rollout_logprobs.tolist() == [[0.0]]


def test_an_empty_micro_batch_has_a_row_of_one_token_that_nothing_is_trained_on():
    batch = collate([], rollout_with_more)
    assert batch.attention_mask.tolist() == [[True]]
    assert batch.sample_ids.tolist() == [-1]
    assert not batch.completion_mask.any()
    names = ("rollout_logprobs", "advantages", "proximal_logprobs", "reference_logprobs", "topk_logprobs")
    assert all((getattr(batch, name) == 0).all() for name in names)
    assert batch.topk_ids.shape == (1, 1, collate([0], rollout_with_more).topk_ids.shape[2])


def test_collate_aligns_pi_prox_pi_ref_and_the_top_k_with_the_sampled_tokens():
    batch = collate([3, 0, 2], rollout_with_more)
    assert batch.input_ids.tolist() == [[13, 8, 2, 99, 99], [11, 12, 5, 6, 2], [13, 99, 99, 99, 99]]
    expected = torch.tensor([[0, -1.5, -1.6, 0, 0], [0, 0, -1.1, -1.2, -1.3], [0, 0, 0, 0, 0]])
    torch.testing.assert_close(batch.proximal_logprobs, expected)
    torch.testing.assert_close(batch.reference_logprobs, expected - batch.completion_mask.float())
    none = [0, 0]
    ids = [
        [none, [300, 301], [310, 311], none, none],
        [none, none, [0, 1], [10, 11], [20, 21]],
        [none] * 5,
    ]
    assert batch.topk_ids.tolist() == ids
    torch.testing.assert_close(batch.topk_logprobs, -torch.tensor(ids) / 1000)
    assert batch.topk_ids.dtype == torch.int64
    assert (batch.topk_logprobs.dtype, batch.proximal_logprobs.dtype) == (torch.float32, torch.float32)
    assert batch.reference_logprobs.dtype == torch.float32


def test_collate_without_pi_prox_pi_ref_and_top_k_has_none():
    batch = collate([0, 1])
    assert (batch.proximal_logprobs, batch.reference_logprobs) == (None, None)
    assert (batch.topk_ids, batch.topk_logprobs) == (None, None)


def test_the_row_of_a_dropped_sample_has_no_completion_tokens():
    dropped = replace(rollout_with_more(), rewards=torch.tensor([math.nan, 0.0, 0.5, 0.25]))
    assert dropped.is_kept.tolist() == [False, True, True, True]
    batch, whole = (collate([0, 3], lambda of=of: of) for of in (dropped, rollout_with_more()))
    assert torch.equal(batch.input_ids, whole.input_ids)
    assert torch.equal(batch.attention_mask, whole.attention_mask)
    per_token = ("completion_mask", "rollout_logprobs", "advantages", "proximal_logprobs", "reference_logprobs")
    for name in (*per_token, "topk_ids", "topk_logprobs"):
        assert not getattr(batch, name)[0].any()
        assert torch.equal(getattr(batch, name)[1], getattr(whole, name)[1])


def test_a_batch_that_is_only_scored_has_dropped_samples_too():
    dropped = replace(rollout(), rewards=torch.full((4,), math.nan))
    sizes = {"pad_token_id": 99, "num_update_tokens": 0, "num_update_sequences": 0}
    batch = RolloutBatch.collate(dropped, [0, 1, 3], None, **sizes)
    assert torch.equal(batch.completion_mask, collate([0, 1, 3]).completion_mask)
    assert batch.advantages.eq(0).all()


def test_a_row_knows_its_sample():
    assert collate([3, 0, 2]).sample_ids.tolist() == [3, 0, 2]


def test_lightning_moves_the_optional_tensors_too():
    moved = move_data_to_device(collate([0, 1], rollout_with_more), torch.device("meta"))
    for name in ("sample_ids", "proximal_logprobs", "reference_logprobs", "topk_ids", "topk_logprobs"):
        assert getattr(moved, name).device.type == "meta"


@pytest.mark.parametrize("name", ["topk_ids", "topk_logprobs"])
def test_a_completion_needs_one_row_of_the_top_k_per_token(name):
    dtype = torch.long if name == "topk_ids" else torch.float32
    with pytest.raises(ValueError, match=f"a completion of 2 tokens has 3 rows of `{name}`"):
        Completion([1, 2], [-0.1, -0.2], "stop", **{name: torch.zeros(3, 4, dtype=dtype)})


def test_a_completion_needs_one_logprob_per_token():
    with pytest.raises(ValueError, match="a completion of 2 tokens has 1 logprobs"):
        Completion([1, 2], [-0.1], "stop")


def test_collated_tensors_have_the_types_that_a_model_takes():
    batch = collate([0, 2])
    assert [getattr(batch, name).dtype for name in TENSORS] == [
        torch.int64,
        torch.bool,
        torch.bool,
        torch.float32,
        torch.float32,
    ]


@pytest.mark.parametrize("name", TENSORS[1:])
@pytest.mark.usefixtures("unchecked_hints")
def test_a_batch_long_tensor_raises_although_it_would_broadcast(name):
    with pytest.raises(ValueError, match=rf"`{name}` must have the shape of `input_ids` \[3, 3\], got \[3\]"):
        square(**{name: square().advantages[0].to(getattr(square(), name).dtype)})


@pytest.mark.parametrize("name", ["proximal_logprobs", "reference_logprobs"])
@pytest.mark.usefixtures("unchecked_hints")
def test_an_optional_tensor_of_another_shape_raises(name):
    with pytest.raises(ValueError, match=rf"`{name}` must have the shape of `input_ids` \[3, 3\], got \[3\]"):
        square(**{name: torch.zeros(3)})


@pytest.mark.usefixtures("unchecked_hints")
def test_shapes_that_would_broadcast_raise():
    with pytest.raises(ValueError, match=r"`advantages` must have the shape of `input_ids` \[3, 3\], got \[3, 1\]"):
        square(advantages=torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"`input_ids` must be \[batch, seq\], got \[3\]"):
        square(input_ids=torch.ones(3, dtype=torch.long))


def test_lightning_moves_a_batch_to_a_device():
    batch = collate([0, 1])
    moved = move_data_to_device(batch, torch.device("meta"))
    assert isinstance(moved, RolloutBatch)
    assert {getattr(moved, name).device.type for name in TENSORS} == {"meta"}
    assert {getattr(batch, name).device.type for name in TENSORS} == {"cpu"}
    assert (moved.num_update_tokens, moved.num_update_sequences) == (6, 4)


def test_lightning_applies_a_function_to_the_tensors_of_a_batch():
    batch = collate([0, 1])
    doubled = apply_to_collection(batch, torch.Tensor, lambda tensor: tensor * 2)
    assert torch.equal(doubled.advantages, 2 * batch.advantages)
    assert torch.equal(batch.advantages, collate([0, 1]).advantages)


def test_rollout_counts_samples_tokens_and_groups():
    assert len(rollout()) == 4
    assert rollout().num_completion_tokens == 6
    assert rollout().group_rewards.tolist() == [[1.0, 0.0], [0.5, 0.25]]


def test_a_penalty_is_taken_off_the_rewards_and_leaves_them_as_they_are():
    penalized = replace(rollout(), reference_penalties=torch.tensor([0.5, -0.25, 0.0, 1.0]))
    assert penalized.penalized_rewards.tolist() == [0.5, 0.25, 0.5, -0.75]
    assert torch.equal(penalized.rewards, rollout().rewards)
    assert torch.equal(rollout().penalized_rewards, rollout().rewards)


def test_rollouts_do_not_share_their_reward_parts():
    first, second = rollout(), rollout()
    first.reward_parts["accuracy"] = torch.ones(4)
    assert second.reward_parts == {}


def test_a_completion_is_truncated_if_it_ended_by_length():
    assert Completion([1], [-0.1], "length").is_truncated
    assert not Completion([1], [-0.1], "stop").is_truncated


def test_sampling_knows_whether_every_token_can_be_drawn():
    assert Sampling().is_full_distribution
    assert Sampling(temperature=0.5).is_full_distribution
    assert not Sampling(top_p=0.9).is_full_distribution
    assert not Sampling(top_k=20).is_full_distribution


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, r"`sampling.max_tokens` must be at least 1, got 0"),
        ({"temperature": -0.1}, r"`sampling.temperature` must be 0 or positive, got -0.1"),
        ({"temperature": float("inf")}, r"`sampling.temperature` must be 0 or positive, got inf"),
        ({"temperature": float("nan")}, r"`sampling.temperature` must be 0 or positive, got nan"),
        ({"top_p": 0.0}, r"`sampling.top_p` must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"`sampling.top_p` must be in \(0, 1\], got 1.1"),
        ({"top_k": -1}, r"`sampling.top_k` must be 0 \(all tokens\) or positive, got -1"),
    ],
)
def test_bad_sampling_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_sampling_bounds_are_accepted():
    assert Sampling(max_tokens=1, temperature=0.0, top_p=1.0, top_k=0).max_tokens == 1
