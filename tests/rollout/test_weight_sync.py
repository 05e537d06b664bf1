"""Weight syncs that look successful and are not: each on the real vLLM, with its safeguard."""

import pytest
import torch

from drpo_lightning.batch import Sampling
from drpo_lightning.callbacks import SyncProbe
from drpo_lightning.modules import PolicyModule
from drpo_lightning.rollout import EngineError, VLLMEngine, check_weights
from drpo_lightning.rollout.in_process_vllm import InProcessVLLM
from drpo_lightning.rollout.weights import model_weight_shapes
from tests.rollout.conftest import MODEL, start
from tests.rollout.test_engines import EOS, TOLERANCE, trainer_logprobs

LONG_PROMPTS = torch.randint(3, 98, (4, 300), generator=torch.Generator().manual_seed(0)).tolist()
"""More than two blocks of vLLM's prefix cache (128 tokens on a CPU): shorter prompts would not show a stale one."""


def worst_difference(engine, policy):
    """Largest |log pi - log mu| over sampled tokens."""
    sampling = Sampling(max_tokens=4)
    groups = engine.generate(LONG_PROMPTS, sampling, num_samples=2, stop_token_ids=[EOS], seeds=[1, 2, 3, 4])
    return max(
        (torch.tensor(completion.logprobs) - trainer_logprobs(policy, prompt, completion, sampling)).abs().max().item()
        for prompt, group in zip(LONG_PROMPTS, groups, strict=True)
        for completion in group
    )


def test_after_a_sync_the_engine_generates_with_the_trainers_weights(engine, policy, perturbed):
    assert worst_difference(engine, policy) < TOLERANCE  # the prompts are in the prefix cache from here on
    assert worst_difference(engine, perturbed) > 0.5
    engine.load_weights(perturbed.state_dict().items())
    assert worst_difference(engine, perturbed) < TOLERANCE


def test_syncs_can_be_repeated_in_any_order_of_names(engine, policy, perturbed):
    for model in (perturbed, policy, perturbed):
        engine.load_weights(reversed(model.state_dict().items()))
        assert worst_difference(engine, model) < TOLERANCE


def test_tied_weights_are_offered_under_both_names(policy):
    assert policy.config.tie_word_embeddings
    assert "lm_head.weight" not in dict(policy.named_parameters())
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= policy.state_dict().keys()
    expected = model_weight_shapes(MODEL)
    check_weights({name: tensor.shape for name, tensor in policy.state_dict().items()}, expected)
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        check_weights({name: tensor.shape for name, tensor in policy.named_parameters()}, expected)


def test_a_tied_head_left_behind_would_go_unnoticed_by_vllm(vllm_engine, policy, perturbed):
    # Why `check_weights` insists on every name: vLLM takes the incomplete set without an error.
    vllm_engine.load_weights(policy.state_dict().items())
    vllm_engine.load_weights(perturbed.named_parameters())
    assert worst_difference(vllm_engine, perturbed) > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shapes: shapes.pop("model.norm.weight"), r"missing: model\.norm\.weight"),
        (lambda shapes: shapes.update(extra=torch.Size([1])), "unknown: extra"),
        (
            lambda shapes: shapes.update({"model.norm.weight": torch.Size([64])}),
            r"shape of model\.norm\.weight: \[64\] instead of \[128\]",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_weights_that_do_not_fit_are_named(change, message):
    offered = model_weight_shapes(MODEL)
    change(offered)
    with pytest.raises(ValueError, match=message):
        check_weights(offered, model_weight_shapes(MODEL))


def test_a_weight_that_the_engine_refuses_is_an_error(vllm_engine, policy):
    weights = policy.state_dict()
    weights["model.nonsense"] = torch.zeros(1)
    with pytest.raises(EngineError, match="`load_weights` failed in the engine's process"):
        vllm_engine.load_weights(weights.items())
    # What was loaded by then is undefined: the engine has to be started again.
    vllm_engine.close()
    start(vllm_engine)
    assert worst_difference(vllm_engine, policy) < TOLERANCE


class KeepsPrefixCache(InProcessVLLM):
    """vLLM without the safeguard against cached prefixes of older weights."""

    def load_weights(self, weights, *_):
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})


@pytest.fixture
def run_on_vllm(make_run):
    """A small run whose weights change by a lot at every update."""

    def run(*callbacks):
        return make_run(
            *callbacks,
            trainer={"max_epochs": 2},
            module={"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=5.0)},
            data={"engine": VLLMEngine(process="own", dtype="float32", enforce_eager=True)},
        )

    return run


def test_the_probe_passes_after_every_sync(run_on_vllm):
    run_on_vllm(SyncProbe()).fit()


def test_the_probe_finds_a_prefix_cache_kept_from_older_weights(run_on_vllm, monkeypatch):
    monkeypatch.setattr("drpo_lightning.rollout.vllm.InProcessVLLM", KeepsPrefixCache)
    with pytest.raises(EngineError, match=r"differ by .* nats on the probe"):
        run_on_vllm(SyncProbe()).fit()


def test_the_probe_finds_a_tied_head_left_behind(run_on_vllm, monkeypatch):
    whole = PolicyModule.named_weights
    monkeypatch.setattr(
        PolicyModule, "named_weights", lambda self: (item for item in whole(self) if item[0] != "lm_head.weight")
    )
    with pytest.raises(EngineError, match=r"differ by .* nats on the probe"):
        run_on_vllm(SyncProbe()).fit()


def test_nan_weights_are_not_sent(run_on_vllm, make_recorder):
    def poison(trainer, pl_module, batch_idx):
        if batch_idx == 1:
            with torch.no_grad():
                pl_module.network.language_model.model.norm.weight[3] = torch.nan

    run = run_on_vllm(recorder := make_recorder(poison))
    with pytest.raises(ValueError, match="a weight of the policy is NaN or infinite"):
        run.fit()
    assert recorder.events.count("refresh") == 1
    assert not run.data.engine.is_started
