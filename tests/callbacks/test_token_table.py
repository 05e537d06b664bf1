"""The table of corrected tokens: counted as one would by hand, and nothing in a token is markup."""

import html
import itertools
import math
import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from drpo_lightning.callbacks.token_table import (
    TokenCounts,
    TokenTable,
    corrected_tokens,
    merged,
    no_tokens,
    token_table,
)
from drpo_lightning.callbacks.update_statistics import CompletionTokens
from drpo_lightning.objectives import DPPO, DRPO


class Tokenizer:
    """Decodes a token to the text that stands for it."""

    def __init__(self, **texts):
        self.texts = {int(name.removeprefix("t")): text for name, text in texts.items()}

    def decode(self, token_ids):
        (token_id,) = token_ids
        return self.texts.get(token_id, f"<{token_id}>")


def random_tokens(seed, num_tokens=200, has_mask=False):
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(num_tokens, generator=generator)

    advantages = normal() * (normal() > -0.8)
    return CompletionTokens(
        token_ids=torch.randint(9, (num_tokens,), generator=generator),
        policy_logprobs=-normal().abs(),
        rollout_logprobs=-normal().abs(),
        advantages=advantages,
        grad_weight=torch.where(advantages == 0, math.nan, normal()),
        beyond_clamp=torch.zeros(num_tokens, dtype=torch.bool),
        keep=normal() > 0 if has_mask else None,
        proximal_logprobs=None,
    )


def cut(tokens, places):
    return CompletionTokens(*(None if column is None else column[places] for column in tokens))


def by_token(counts):
    """Sums by token id, as numbers."""
    return dict(zip(counts.token_ids.tolist(), counts.sums.tolist(), strict=True))


def reference(tokens):
    """One token at a time."""
    sums = {}
    for i, token_id in enumerate(tokens.token_ids.tolist()):
        weight, advantage = float(tokens.grad_weight[i]), float(tokens.advantages[i])
        is_dropped = tokens.keep is not None and not tokens.keep[i]
        if advantage != 0 and (weight < 0 or is_dropped):
            mu, pi = math.exp(tokens.rollout_logprobs[i]), math.exp(tokens.policy_logprobs[i])
            values = [1, weight, mu, pi, advantage > 0]
            sums[token_id] = [a + b for a, b in zip(sums.get(token_id, [0] * 5), values, strict=True)]
    return sums


def is_reference(counts, tokens):
    expected = reference(tokens)
    found = by_token(counts)
    assert found.keys() == expected.keys()
    assert all(found[token_id] == pytest.approx(expected[token_id], rel=1e-5) for token_id in expected)
    assert counts.num_tokens == len(tokens.token_ids)
    return True


@given(st.integers(0, 2**32 - 1), st.booleans(), st.lists(st.integers(0, 200), max_size=4))
def test_counts_are_those_of_a_loop_however_the_tokens_are_split(seed, has_mask, cuts):
    tokens = random_tokens(seed, has_mask=has_mask)
    edges = [0, *sorted(cuts), 200]
    counts = no_tokens(torch.device("cpu"))
    for start, end in itertools.pairwise(edges):
        counts = merged([counts, corrected_tokens(cut(tokens, slice(start, end)))])
    assert is_reference(counts, tokens)


@given(st.integers(0, 2**32 - 1), st.integers(0, 200))
def test_the_counts_of_two_ranks_merge_to_those_of_one(seed, place):
    tokens = random_tokens(seed)
    ranks = [corrected_tokens(cut(tokens, part)) for part in (slice(0, place), slice(place, None))]
    assert is_reference(merged(ranks), tokens)


def test_a_table_worked_by_hand():
    counts = TokenCounts(
        torch.tensor([3, 5, 8]),
        torch.tensor([[1, -2.0, 0.5, 0.25, 1], [6, -3.0, 0.06, 3.0, 3], [3, 0.0, 2.7, 0.0, 0]]),
        num_tokens=1000,
    )
    assert token_table(counts, Tokenizer(t5=" the", t8="a"), num_tokens=2).splitlines() == [
        "10 of 1000 tokens (1.000%) were masked or corrected.",
        "",
        "| token id | text | count | share | mean w | mean mu | mean pi | A > 0 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 5 | ' the' | 6 | 60.0% | -0.5 | 0.01 | 0.5 | 50.0% |",
        "| 8 | 'a' | 3 | 30.0% | 0 | 0.9 | 0 | 0.0% |",
    ]


def test_if_no_token_was_corrected_the_table_says_so():
    tokens = random_tokens(0)._replace(grad_weight=torch.ones(200))
    assert token_table(corrected_tokens(tokens), Tokenizer(), 5) == "None of 200 tokens was masked or corrected."
    nothing = no_tokens(torch.device("cpu"))
    assert token_table(nothing, Tokenizer(), 5) == "None of 0 tokens was masked or corrected."


@given(st.text(alphabet="ab|<>&*_`[]\\\n\r\t#-!()~:\"' ", max_size=12))
def test_no_token_breaks_the_table(text):
    counts = TokenCounts(torch.tensor([1, 2]), torch.tensor([[2.0, -1, 1, 1, 1], [1, -1, 1, 1, 1]]), 9)
    table = token_table(counts, Tokenizer(t1=text, t2="next"), 2)
    rows = re.findall("<tr>(.*?)</tr>", markdown_to_safe_html(table), re.DOTALL)
    cells = [[html.unescape(cell) for cell in re.findall("<t[dh]>(.*?)</t[dh]>", row, re.DOTALL)] for row in rows]
    assert [len(row) for row in cells] == [8, 8, 8]
    assert cells[1][1] == repr(text)
    assert cells[2][1] == "'next'"


def run_tables(make_run, folder, recorder, **trainer):
    """The tables of a run by step, of all its corrected tokens."""
    objective, rollouts = trainer.pop("objective"), trainer.pop("every_n_rollouts", 1)
    logger = TensorBoardLogger(folder, default_hp_metric=False)
    make_run(
        TokenTable(num_tokens=999, every_n_rollouts=rollouts),
        recorder,
        trainer={"logger": logger} | trainer,
        module={"objective": objective, "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.3)},
    ).fit()
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0}).Reload()
    if "tokens/corrected/text_summary" not in events.Tags()["tensors"]:
        return {}
    return {
        event.step: event.tensor_proto.string_val[0].decode()
        for event in events.Tensors("tokens/corrected/text_summary")
    }


@pytest.mark.parametrize("objective", [DRPO(0.02), DPPO("binary_tv", 0.02)], ids=["drpo", "dppo"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_run_counts_every_corrected_token_of_its_rollouts(make_run, make_recorder, tmp_path, objective, accumulate):
    recorder = make_recorder()
    tables = run_tables(
        make_run, tmp_path, recorder, objective=objective, max_epochs=5, accumulate_grad_batches=accumulate,
        every_n_rollouts=2,
    )  # fmt: skip
    assert list(tables) == [4, 8]
    pairs = list(zip(itertools.chain(*recorder.batches), recorder.outputs, strict=True))
    for i, table in enumerate(tables.values()):
        expected, num_tokens = Counter(), 0
        for batch, output in pairs[4 * accumulate * i :][: 4 * accumulate]:
            mask, terms = batch.completion_mask, output["objective"]
            dropped = torch.zeros_like(mask) if terms.keep is None else ~terms.keep & (batch.advantages != 0)
            num_tokens += int(mask.sum())
            expected.update(batch.input_ids[mask & (dropped | (terms.grad_weight < 0))].tolist())
        assert expected
        assert table.startswith(f"{expected.total()} of {num_tokens} tokens ")
        rows = [line.split(" | ") for line in table.splitlines()[4:]]
        assert {int(row[0].strip("| ")): int(row[2]) for row in rows} == expected
        counts = [int(row[2]) for row in rows]
        assert counts == sorted(counts, reverse=True)


def test_a_run_that_corrects_nothing_says_so(make_run, make_recorder, tmp_path):
    (table,) = run_tables(make_run, tmp_path, make_recorder(), objective=DRPO(12.5)).values()
    assert re.fullmatch(r"None of \d+ tokens was masked or corrected\.", table)


def test_without_tensorboard_nothing_is_written(make_run, make_memory):
    make_run(TokenTable(every_n_rollouts=1), trainer={"logger": make_memory()}).fit()


@pytest.mark.parametrize("name", ["num_tokens", "every_n_rollouts"])
def test_settings_are_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        TokenTable(**{name: 0})
