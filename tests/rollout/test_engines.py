"""The contract that every engine keeps, on the real engines."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Callback

from drpo_lightning.batch import Sampling
from drpo_lightning.callbacks import SyncProbe
from drpo_lightning.errors import SettingError
from drpo_lightning.functional import sampling_logprobs
from drpo_lightning.rollout import EngineError, RolloutHooks, TransformersEngine, VLLMEngine
from drpo_lightning.rollout.in_process_vllm import InProcessVLLM
from drpo_lightning.rollout.transformers import round_to_fp8
from tests.rollout.conftest import MODEL, start

EOS = 1
PROMPTS = [[20, 21, 14, 22, 23, 32], [28, 14, 20, 32], [19, 14, 19, 32]]  # 12+34=, 9+1=, 0+0=
TOLERANCE = 1e-4
"""Of a logprob, in nats. Measured in float32: 5e-6 for transformers and 2e-5 for vLLM at most."""


def generate(engine, sampling, num_samples=4, seeds=(7, 8, 9), prompts=PROMPTS, **settings):
    return engine.generate(prompts, sampling, num_samples=num_samples, stop_token_ids=[EOS], seeds=seeds, **settings)


@torch.no_grad()
def trainer_logprobs(policy, prompt, completion, sampling):
    """log mu of each token of a completion, by one forward pass over the whole sequence."""
    logprobs = trainer_distribution(policy, prompt, completion, sampling)
    return logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]


@torch.no_grad()
def trainer_distribution(policy, prompt, completion, sampling):
    """log mu of every token of the vocabulary at each place of a completion."""
    logits = policy(input_ids=torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
    return sampling_logprobs(logits, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=8),
        Sampling(max_tokens=8, temperature=0.7),
        Sampling(max_tokens=8, temperature=1.3, top_k=5),
        Sampling(max_tokens=8, top_p=0.8),
    ],
    ids=["plain", "cold", "top_k", "top_p"],
)
def test_logprobs_are_those_of_the_distribution_that_was_sampled_from(engine, policy, sampling):
    groups = generate(engine, sampling)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            expected = trainer_logprobs(policy, prompt, completion, sampling)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=TOLERANCE)


def test_every_prompt_gets_its_samples_and_they_differ(engine):
    groups = generate(engine, Sampling(max_tokens=8, temperature=2.0), num_samples=5)
    assert [len(group) for group in groups] == [5, 5, 5]
    for group in groups:
        assert len({tuple(completion.token_ids) for completion in group}) > 1


def test_a_completion_ends_with_its_stop_token_or_is_truncated(engine):
    completions = [c for group in generate(engine, Sampling(max_tokens=2, temperature=1.5), 16) for c in group]
    for completion in completions:
        if completion.is_truncated:
            assert len(completion.token_ids) == 2
            assert EOS not in completion.token_ids
        else:
            assert completion.token_ids.index(EOS) == len(completion.token_ids) - 1
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}


def test_equal_seeds_give_equal_completions(engine):
    first, again = (generate(engine, Sampling(max_tokens=8)) for _ in range(2))
    assert first == again
    assert generate(engine, Sampling(max_tokens=8), seeds=(70, 80, 90)) != first


def test_a_sample_does_not_depend_on_the_other_prompts(engine):
    together = generate(engine, Sampling(max_tokens=8))
    alone = generate(engine, Sampling(max_tokens=8), seeds=(8,), prompts=PROMPTS[1:2])
    assert [c.token_ids for c in alone[0]] == [c.token_ids for c in together[1]]


def test_more_prompt_tokens_than_an_engine_computes_at_a_time_are_sampled_with_seeds(engine):
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(20, 32, (30, 200), generator=generator).tolist()  # 6000 tokens; vLLM takes 4096
    groups = engine.generate(prompts, Sampling(max_tokens=2), num_samples=1, stop_token_ids=[EOS], seeds=range(30))
    alone = engine.generate(prompts[-1:], Sampling(max_tokens=2), num_samples=1, stop_token_ids=[EOS], seeds=[29])
    assert [len(group) for group in groups] == [1] * 30
    assert groups[-1][0].token_ids == alone[0][0].token_ids


def test_without_seeds_every_call_draws_anew(engine):
    first, second = (generate(engine, Sampling(max_tokens=8, temperature=2.0), 8, seeds=None) for _ in range(2))
    assert first != second


def test_frequencies_are_those_that_the_logprobs_say(engine, policy):
    sampling = Sampling(max_tokens=1, temperature=1.5)
    group = generate(engine, sampling, 4000, seeds=(3,), prompts=PROMPTS[:1])[0]
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in group]), minlength=policy.config.vocab_size)
    with torch.no_grad():
        probabilities = policy(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1].div(1.5).softmax(-1)
    likely = probabilities * 4000 > 5
    expected = torch.cat([probabilities[likely], probabilities[~likely].sum()[None]]) * 4000
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]]).float()
    chi_squared = ((observed - expected) ** 2 / expected.clamp(min=1)).sum() / (len(expected) - 1)
    assert chi_squared < 2.5


def test_greedy_takes_the_most_likely_token(engine, policy):
    group = generate(engine, Sampling(max_tokens=1, temperature=0.0), 1)[0]
    with torch.no_grad():
        assert group[0].token_ids == [int(policy(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1].argmax())]


def test_the_trainers_random_numbers_are_left_alone(engine):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    generate(engine, Sampling(max_tokens=4))
    assert torch.equal(torch.rand(3), expected)


def test_a_started_engine_knows_its_context_and_precision(engine):
    assert engine.is_started
    assert engine.context_tokens == 512
    assert engine.dtype_name == "float32"


def test_sleep_is_an_error_on_a_cpu_unless_auto(engine):
    engine.sleep()
    engine.wake()
    for kind in (VLLMEngine, TransformersEngine):
        with pytest.raises(SettingError, match=r"`sleep: always` is not supported by .*; set `sleep: auto`"):
            kind(sleep="always").start(MODEL, device=torch.device("cpu"), num_ranks=1, seed=0)


def test_in_process_vllm_is_refused_on_several_ranks():
    with pytest.raises(SettingError, match="`process: in_process` works on one rank only, got 2"):
        VLLMEngine(process="in_process").start(MODEL, device=torch.device("cpu"), num_ranks=2, seed=0)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [({"stall_timeout_seconds": 0}, "must be positive, got 0"), ({"max_restarts": -1}, "must not be negative, got -1")],
)
def test_settings_that_are_out_of_range_are_refused(setting, problem):
    with pytest.raises(ValueError, match=f"`{next(iter(setting))}` {problem}"):
        VLLMEngine(**setting)


class Noting(InProcessVLLM):
    """Only notes what vLLM would be started with."""

    def __init__(self, llm_kwargs):
        self.llm_kwargs = llm_kwargs

    def properties(self):
        return 64, 0, "float32"


def test_arguments_of_vllm_are_passed_through_untouched(monkeypatch):
    chosen = {"kv_cache_memory_bytes": 5 * 2**30, "max_loras": 4, "max_lora_rank": 64, "enable_chunked_prefill": True}
    engine = VLLMEngine(process="in_process", engine_kwargs=chosen | {"block_size": 64})
    monkeypatch.setattr("drpo_lightning.rollout.vllm.InProcessVLLM", Noting)
    with patch.dict(os.environ):
        engine.start(MODEL, device=torch.device("cpu"), num_ranks=1, seed=0, adapter_rank=4)
    given = engine._local.llm_kwargs
    assert {name: given[name] for name in chosen} == chosen
    assert given["block_size"] == 64
    assert given["enable_lora"] is True


@pytest.mark.parametrize("name", ["enable_sleep_mode", "enable_lora", "seed", "logprobs_mode"])
def test_arguments_of_vllm_that_other_settings_decide_on_are_refused(name):
    with pytest.raises(ValueError, match=rf"`engine_kwargs` must not hold \['{name}'\]"):
        VLLMEngine(engine_kwargs={name: 1})


def test_vllm_in_the_trainers_process_cannot_be_restarted():
    assert VLLMEngine(process="in_process").max_restarts == 0
    assert VLLMEngine(process="own").max_restarts == 3


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_sleep_with_expandable_segments_is_warned_of(monkeypatch, name):
    engine, waking = VLLMEngine(), VLLMEngine(sleep="never")
    engine._on_cpu = waking._on_cpu = False
    assert engine._memory_kwargs() == {"enable_sleep_mode": True}
    monkeypatch.setenv(name, "max_split_size_mb:64, expandable_segments: True")
    with pytest.warns(UserWarning, match=f"`{name}` has expandable_segments:True.*set `sleep: never`"):
        engine._memory_kwargs()
    assert waking._memory_kwargs() == {}
    monkeypatch.setenv(name, "expandable_segments:False")
    assert engine._memory_kwargs() == {"enable_sleep_mode": True}


def test_without_vllm_the_error_names_the_ways_out(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"vLLM is not installed.*TransformersEngine"):
        VLLMEngine().check_available()


def test_closing_is_possible_at_any_time():
    for engine in (VLLMEngine(), TransformersEngine()):
        engine.close()
        engine.close()
        assert not engine.is_started


# ---------------------------------------------------------------- the most likely tokens

HOT = Sampling(max_tokens=6, temperature=2.0)
VOCABULARY = 98


def with_topk(engine):
    """Completions with the top 5, with the whole vocabulary, and without any."""
    return [generate(engine, HOT, num_topk=num_topk) for num_topk in (5, -1, 0)]


@pytest.fixture(scope="session")
def in_process_rollouts(tmp_path_factory):
    """Those of vLLM in the trainer's process, which is one of its own here: it keeps what vLLM leaves behind."""
    path = tmp_path_factory.mktemp("vllm") / "rollouts.pt"
    script = (
        "import torch\n"
        "from drpo_lightning.rollout import VLLMEngine\n"
        "from tests.rollout.conftest import start\n"
        "from tests.rollout.test_engines import with_topk\n"
        "torch.set_float32_matmul_precision('high')\n"
        "engine = start(VLLMEngine(process='in_process', dtype='float32'))  # eager, on a CPU\n"
        "assert torch.get_float32_matmul_precision() == 'high', 'the trainer computes with it, too'\n"
        "torch.set_float32_matmul_precision('highest')\n"
        f"torch.save(with_topk(engine), {str(path)!r})\n"
        "engine.close()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2], timeout=300)
    return torch.load(path, weights_only=False)


@pytest.fixture(params=["transformers", "vllm", "vllm_in_process"])
def topk_rollouts(request, policy):
    """What `with_topk` returns, of each engine."""
    if request.param == "vllm_in_process":
        return request.getfixturevalue("in_process_rollouts")
    engine = request.getfixturevalue(f"{request.param}_engine")
    engine.load_weights(policy.state_dict().items())
    return with_topk(engine)


def test_the_top_k_are_the_most_likely_tokens_in_order_with_their_logprobs(topk_rollouts, policy):
    likely, whole, plain = topk_rollouts
    for rollout, k in ((likely, 5), (whole, VOCABULARY)):
        for prompt, group in zip(PROMPTS, rollout, strict=True):
            for completion in group:
                expected = trainer_distribution(policy, prompt, completion, HOT)
                got = completion.topk_logprobs
                assert completion.topk_ids.shape == got.shape == (len(completion.token_ids), k)
                assert (completion.topk_ids.dtype, got.dtype) == (torch.int64, torch.float32)
                torch.testing.assert_close(got, expected.topk(k).values, rtol=0, atol=TOLERANCE)
                torch.testing.assert_close(got, expected.gather(1, completion.topk_ids), rtol=0, atol=TOLERANCE)
                assert all(len(set(ids)) == k for ids in completion.topk_ids.tolist())
    assert plain == likely == whole, "what is asked for changes nothing that is sampled"
    assert (
        {c.topk_ids for group in plain for c in group} == {c.topk_logprobs for group in plain for c in group} == {None}
    )


def test_the_logprobs_of_the_whole_vocabulary_sum_to_one(topk_rollouts):
    for completion in (completion for group in topk_rollouts[1] for completion in group):
        torch.testing.assert_close(
            completion.topk_logprobs.exp().sum(1), torch.ones(len(completion.token_ids)), rtol=0, atol=TOLERANCE
        )
        sampled = torch.tensor(completion.token_ids)[:, None] == completion.topk_ids
        torch.testing.assert_close(completion.topk_logprobs[sampled], torch.tensor(completion.logprobs))


def test_a_sampled_token_need_not_be_among_the_top_k(topk_rollouts):
    inside = []
    for completion in (completion for group in topk_rollouts[0] for completion in group):
        sampled = torch.tensor(completion.token_ids)[:, None] == completion.topk_ids
        own, least = torch.tensor(completion.logprobs), completion.topk_logprobs[:, -1]
        held = sampled.any(1)
        torch.testing.assert_close(completion.topk_logprobs[sampled], own[held])
        assert (own[~held] <= least[~held] + TOLERANCE).all()
        inside += held.tolist()
    assert 0 < sum(inside) < len(inside)


# ---------------------------------------------------------------- an engine of lower precision


def linear_weights(model):
    return [name for name in model.state_dict() if name.endswith("_proj.weight")]


def test_fp8_takes_the_nearest_of_the_numbers_that_eight_bits_can_tell_apart():
    weight = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    rounded = round_to_fp8(weight)
    scale = weight.abs().max() / 448
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].unique() * scale
    nearest = (weight.flatten()[:, None] - numbers).abs().min(1).values.view_as(weight)
    torch.testing.assert_close((rounded - weight).abs(), nearest, rtol=1e-4, atol=1e-7)
    assert len(rounded.unique()) <= 2**8
    assert rounded.dtype == torch.float32
    assert rounded.abs().max() == weight.abs().max()
    torch.testing.assert_close(round_to_fp8(rounded), rounded, rtol=1e-6, atol=0.0)
    assert torch.equal(round_to_fp8(-weight), -rounded)
    assert torch.equal(round_to_fp8(torch.zeros(3, 3)), torch.zeros(3, 3))


def test_fp8_rounds_the_linear_layers_but_the_head_at_the_start_and_at_every_sync(policy, perturbed):
    engine = start(TransformersEngine("fp8"))
    assert len(linear_weights(policy)) == 14
    for num_syncs, source in enumerate((policy, perturbed, policy)):
        if num_syncs:
            engine.load_weights(source.state_dict().items())
        own = engine._model.state_dict()
        for name, tensor in source.state_dict().items():
            if name in linear_weights(source):
                assert len(own[name].unique()) <= 2**8 < len(tensor.unique())
                assert torch.equal(own[name], round_to_fp8(tensor))
            else:
                assert torch.equal(own[name], tensor), name
    assert engine.dtype_name == "fp8"


def worst_and_mean_mismatch(engine, policy):
    differences = torch.cat(
        [
            (torch.tensor(completion.logprobs) - trainer_logprobs(policy, prompt, completion, HOT)).abs()
            for prompt, group in zip(PROMPTS, generate(engine, HOT, 32), strict=True)
            for completion in group
        ]
    )
    return differences.max().item(), differences.mean().item()


def test_fp8_does_not_match_the_trainer_and_is_not_far_from_it(fp8_engine, transformers_engine, policy):
    for engine in (fp8_engine, transformers_engine):
        engine.load_weights(policy.state_dict().items())
    (worst, mean), (exact, _) = (worst_and_mean_mismatch(e, policy) for e in (fp8_engine, transformers_engine))
    assert exact < TOLERANCE
    assert mean > 100 * TOLERANCE
    assert worst < 1


class LoudHead(Callback, RolloutHooks):
    """Gives the engine another head than the trainer's."""

    def on_engine_refresh(self, trainer, pl_module, engine):
        engine._model.lm_head.weight.data.mul_(30)


def test_the_probe_allows_for_an_engine_in_fp8(make_run):
    probe = SyncProbe()
    make_run(probe, data={"engine": TransformersEngine("fp8")}).fit()
    with pytest.raises(EngineError, match=r"differ by .* nats on the probe \(threshold 1 for an engine in fp8\)"):
        make_run(LoudHead(), SyncProbe(), data={"engine": TransformersEngine("fp8")}).fit()
    with pytest.raises(EngineError, match=r"\(threshold 0.001 for an engine in fp8\)"):
        make_run(SyncProbe(threshold=1e-3), data={"engine": TransformersEngine("fp8")}).fit()


@pytest.mark.reliability
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a C++ compiler")
def test_vllm_compiles_on_a_cpu_if_that_is_asked_for(policy):
    engine = start(VLLMEngine(process="own", dtype="float32", enforce_eager=False))
    try:
        group = generate(engine, HOT, prompts=PROMPTS[:1], seeds=(7,))[0]
    finally:
        engine.close()
    for completion in group:
        expected = trainer_logprobs(policy, PROMPTS[0], completion, HOT)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=TOLERANCE)
