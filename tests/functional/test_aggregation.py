"""The share of a micro-batch in the loss of an optimizer update."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_lightning.functional import AGGREGATIONS, aggregate_loss

HORIZON = 10


def share(loss, mask, kind, num_tokens, num_sequences, horizon=HORIZON):
    """`aggregate_loss` on the loss that an objective gives: 0 outside the completions."""
    return aggregate_loss(
        torch.where(mask, loss, 0.0),
        mask,
        kind=kind,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        horizon=horizon,
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("token_mean", (1 + 2 + 6) / 3),
        ("seq_mean_token_mean", ((1 + 2) / 2 + 6 / 1) / 2),
        ("seq_mean_token_sum_norm", (3 / 10 + 6 / 10) / 2),
    ],
)
def test_aggregation_worked_by_hand(kind, expected):
    loss = torch.tensor([[99.0, 1.0, 2.0], [99.0, 6.0, 99.0]])
    mask = torch.tensor([[False, True, True], [False, True, False]])
    assert share(loss, mask, kind, 3, 2).item() == pytest.approx(expected)
    # the same micro-batch as half of an update of twice the size
    assert share(loss, mask, kind, 6, 4).item() == pytest.approx(expected / 2)


def test_every_kind_has_a_worked_example():
    assert set(AGGREGATIONS) == {"token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"}


@pytest.mark.parametrize("kind", AGGREGATIONS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 6), max_size=4))
def test_shares_of_any_split_add_up_to_the_whole_in_value_and_gradient(kind, seed, cuts):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(6, 5, generator=generator)
    mask = torch.rand(6, 5, generator=generator) < torch.rand(6, 1, generator=generator)
    whole, split = (values.clone().requires_grad_() for _ in range(2))
    total = share(whole, mask, kind, int(mask.sum()), 6)
    total.backward()
    edges = [0, *sorted(cuts), 6]
    # equal neighbouring edges make a micro-batch without sequences
    shares = [share(split[a:b], mask[a:b], kind, int(mask.sum()), 6) for a, b in pairwise(edges)]
    torch.stack(shares).sum().backward()
    torch.testing.assert_close(torch.stack(shares).sum(), total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_a_python_loop_gives_the_same(kind):
    generator = torch.Generator().manual_seed(0)
    loss, mask = torch.randn(4, 6, generator=generator), torch.rand(4, 6, generator=generator) < 0.6
    sums, lengths = [0.0] * 4, [0] * 4
    for i in range(4):
        for t in range(6):
            if mask[i, t]:
                sums[i] += loss[i, t].item()
                lengths[i] += 1
    expected = {
        "token_mean": sum(sums) / sum(lengths),
        "seq_mean_token_mean": sum(s / n for s, n in zip(sums, lengths, strict=True) if n) / 4,
        "seq_mean_token_sum_norm": sum(s / HORIZON for s in sums) / 4,
    }
    assert share(loss, mask, kind, sum(lengths), 4).item() == pytest.approx(expected[kind], rel=1e-5)


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_padding_changes_nothing(kind):
    generator = torch.Generator().manual_seed(1)
    loss, mask = torch.randn(3, 4, generator=generator), torch.rand(3, 4, generator=generator) < 0.7
    wide = torch.nn.functional.pad(loss, (0, 5), value=7.0)
    wide_mask = torch.nn.functional.pad(mask, (0, 5), value=False)
    torch.testing.assert_close(share(wide, wide_mask, kind, 8, 3), share(loss, mask, kind, 8, 3))


@pytest.mark.parametrize("kind", AGGREGATIONS)
@pytest.mark.parametrize("rows", [0, 2])
def test_a_micro_batch_without_completion_tokens_has_share_and_gradient_zero(kind, rows):
    loss = torch.ones(rows, 3, requires_grad=True)
    mask = torch.zeros(rows, 3, dtype=torch.bool)
    for num_tokens, num_sequences in ((12, 4), (0, 0)):
        value = share(loss, mask, kind, num_tokens, num_sequences)
        value.backward()
        assert value.item() == 0
    assert (loss.grad == 0).all()


def test_bad_settings_raise():
    loss, mask = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"`kind` must be one of \['seq_mean_token_mean', .*\], got 'mean'"):
        share(loss, mask, "mean", 6, 2)
    with pytest.raises(ValueError, match=r"`horizon` must be set for `seq_mean_token_sum_norm`"):
        share(loss, mask, "seq_mean_token_sum_norm", 6, 2, horizon=None)


@pytest.mark.parametrize("kind", ["token_mean", "seq_mean_token_mean"])
def test_kinds_without_a_horizon_ignore_it(kind):
    loss, mask = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    assert share(loss, mask, kind, 6, 2, horizon=None).item() == share(loss, mask, kind, 6, 2, horizon=5).item() == 1
