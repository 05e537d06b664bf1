"""A batch without its padding gives the logprobs and gradients of the padded one, at the cost of its tokens."""

import copy
import shutil
import sys
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from drpo_lightning.errors import SettingError
from drpo_lightning.modules import PolicyNetwork, packed_attention
from drpo_lightning.modules.language_model import prepare_for_training
from drpo_lightning.modules.packing import PackedSequences, packed_inputs, similar
from drpo_lightning.modules.packing_trial import why_not_packed

VOCABULARY = 50
WINDOW = 6
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
PACKED = {
    "like SmolLM2": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "like Qwen3": Qwen3Config(**SIZES),
    "a mixture of experts": Qwen3MoeConfig(**SIZES, **MIXTURE),
    "with windows": MistralConfig(**SIZES, sliding_window=WINDOW),
    "like Gemma 3": Gemma3TextConfig(
        **SIZES, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "with learned positions": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    ),
}
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
NOT_PACKED = {
    "a recurrent state": (Qwen3NextConfig(**SIZES, **MIXTURE, **DELTA_NET), "off those of the samples apart"),
    "a soft cap": (Gemma2Config(**SIZES, attn_logit_softcapping=50.0), "its attention has `softcap`"),
    "sinks": (GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2), "its attention is eager, not sdpa"),
    "attention of its own": (
        FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        "its attention cannot be exchanged",
    ),
}
LENGTHS = ((3, 5), (1, 2), (14, 30), (2, 7), (1, 0), (2, 21))
"""Tokens of prompt and completion: the third is longer than the windows, and the padding is most of the batch."""


def built(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


def padded(lengths=LENGTHS):
    shape = (len(lengths), max(map(sum, lengths)))
    places = torch.arange(shape[1]).expand(shape)
    prompt, total = (torch.tensor(column)[:, None] for column in ([p for p, _ in lengths], [p + c for p, c in lengths]))
    input_ids = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    return input_ids, places < total, (places >= prompt) & (places < total)


def logprobs_and_gradients(network, inputs):
    """Also of a loss that weighs every token differently."""
    weights = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    network.zero_grad(set_to_none=True)
    logprobs = network(*inputs)
    (weights * logprobs).sum().backward()
    return logprobs.detach(), {name: parameter.grad for name, parameter in network.named_parameters()}


def assert_close(found, expected):
    """In float32: logprobs to 1e-5 nats, gradients to 1e-4 of the largest of each parameter."""
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


@pytest.mark.parametrize("config", PACKED.values(), ids=PACKED.keys())
def test_packed_logprobs_and_gradients_equal_padded_ones(config):
    inputs = padded()
    expected = logprobs_and_gradients(PolicyNetwork(built(config), is_packed=False), inputs)
    network = PolicyNetwork(built(config))
    assert network.is_packed
    found = logprobs_and_gradients(network, inputs)
    assert_close(found, expected)
    assert not torch.equal(found[0], expected[0]), "the two ways are one"


def assert_unchanged_by(config, **preparation):
    """What is done to the layers before a training changes neither logprobs nor gradients."""
    inputs = padded()
    expected = logprobs_and_gradients(PolicyNetwork(built(config)), inputs)
    language_model = built(config)
    network = PolicyNetwork(language_model)
    prepare_for_training(language_model, **preparation)
    assert_close(logprobs_and_gradients(network, inputs), expected)


@pytest.mark.parametrize("name", ["like SmolLM2", "like Gemma 3"])
def test_activations_that_are_computed_again_change_nothing(name):
    assert_unchanged_by(PACKED[name], gradient_checkpointing=True)


@pytest.mark.reliability
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch's own, while it compiles
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.skipif(" " in sys.prefix, reason="torch.compile does not quote the paths that it hands to the compiler")
def test_compiled_layers_change_nothing():
    assert_unchanged_by(PACKED["like Gemma 3"], compile=True)


def test_packed_passes_repeat_bit_for_bit():
    network, inputs = PolicyNetwork(built(PACKED["like SmolLM2"])), padded()
    first, second = (logprobs_and_gradients(network, inputs) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(second[1][name], gradient) for name, gradient in first[1].items())


def test_autocast_computes_attention_in_its_precision_packed_as_padded():
    inputs = padded()
    networks = [PolicyNetwork(built(PACKED["like SmolLM2"]), is_packed=is_packed) for is_packed in (False, True)]
    exact = networks[0](*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = (network(*inputs) for network in networks)
    error = (expected - exact).abs().mean()
    assert 1e-3 < error < 0.1
    assert (found - expected).abs().mean() < 2 * error


def test_other_tokens_are_scored_alike():
    input_ids, attention_mask, completion_mask = padded()
    others = torch.randint(VOCABULARY, (int(completion_mask.sum()), 3), generator=torch.Generator().manual_seed(2))
    networks = [PolicyNetwork(built(PACKED["like Qwen3"]), is_packed=is_packed) for is_packed in (False, True)]
    expected, found = (network(input_ids, attention_mask, completion_mask, others) for network in networks)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_model_sees_no_padding(monkeypatch):
    network, (input_ids, attention_mask, completion_mask) = PolicyNetwork(built(PACKED["like SmolLM2"])), padded()
    seen = []
    network.language_model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    places = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def counted(query, key, *others, **settings):
        places.append(query.shape[0] * query.shape[2] * key.shape[2])
        return attention(query, key, *others, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    network(input_ids, attention_mask, completion_mask)
    assert seen == [(1, int(attention_mask.sum()), 32)]
    of_two_layers, lengths = sum(places), attention_mask.sum(1)
    assert lengths.square().sum() <= of_two_layers / 2 < 2 * lengths.square().sum() < lengths.sum() ** 2


def test_a_model_can_still_be_called_with_padding_by_others():
    language_model, (input_ids, attention_mask, _) = built(PACKED["with windows"]), padded()
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask.long()}
    expected = language_model(**inputs).logits
    PolicyNetwork(language_model, is_packed=True)
    assert torch.equal(language_model(**inputs).logits, expected)


# ---------------------------------------------------------------- which models


@pytest.mark.parametrize(("config", "reason"), NOT_PACKED.values(), ids=NOT_PACKED.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_computes_something_else_is_not_packed(config, reason, dtype, caplog):
    language_model = built(config).to(dtype)
    with caplog.at_level("ERROR"):
        found = why_not_packed(language_model)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize("config", PACKED.values(), ids=PACKED.keys())
def test_models_are_packed_in_half_precision_too(config):
    language_model = built(config).bfloat16()
    assert why_not_packed(language_model) is None
    assert language_model.config._attn_implementation == "sdpa", "the trial has left its attention"


def test_an_attention_that_is_not_told_of_its_window_is_noticed():
    language_model = built(PACKED["like Gemma 3"])
    language_model.model.layers[0].self_attn.sliding_window = None
    assert why_not_packed(language_model) == "an attention whose mask is for a window of 6 tokens is told of None"


def test_layers_that_let_samples_see_each_other_are_noticed():
    language_model = built(PACKED["like SmolLM2"])
    mlp = language_model.model.layers[0].mlp
    mlp.register_forward_hook(lambda module, inputs, output: output + 0.01 * inputs[0].roll(1, 1))
    assert "by what others hold" in why_not_packed(language_model)


def test_the_setting_decides(make_run, monkeypatch):
    def network(packing):
        run = make_run(module={"packing": packing}, trainer={"max_epochs": 0})
        run.fit()
        return run.module.network

    assert network("auto").is_packed
    assert network("always").is_packed
    assert not network("never").is_packed
    monkeypatch.setattr("drpo_lightning.modules.loading.why_not_packed", lambda _: "it is too round")
    assert not network("auto").is_packed
    with pytest.raises(SettingError, match=r"`model\.packing` always: .*arithmetic cannot be packed, it is too round"):
        network("always")


def test_a_model_that_is_not_packed_is_said_to_be_so(make_run, monkeypatch, caplog):
    monkeypatch.setattr("drpo_lightning.modules.loading.why_not_packed", lambda _: "it is too round")
    with caplog.at_level("INFO"):
        make_run(trainer={"max_epochs": 0}).fit()
    assert "is not packed, and computes the padding of micro-batches too: it is too round" in caplog.text


@pytest.mark.parametrize("peft", [False, True])
def test_training_is_the_same_packed_and_padded(make_run, peft):
    from drpo_lightning.modules.lora import LoRA
    from drpo_lightning.modules.reference import ReferencePenalty

    weights = []
    for packing in ("always", "never"):
        run = make_run(
            module={
                "packing": packing,
                "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
                "peft": LoRA(r=2) if peft else None,
                "reference": ReferencePenalty(0.1),
            },
            trainer={"accumulate_grad_batches": 2},
        )
        run.fit()
        weights.append({name: tensor.clone() for name, tensor in run.module.named_weights()})
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=1e-6, msg=name)


# ---------------------------------------------------------------- groups of similar lengths


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20))
def test_groups_hold_every_token_once_and_little_else(lengths):
    sequences = PackedSequences(lengths, torch.device("cpu"))
    groups, tokens = sequences.groups, torch.arange(sum(lengths))
    flat = torch.cat([places.flatten() for places in groups.places])
    assert torch.equal(flat[groups.restore], tokens)
    assert sequences.cumulative_lengths.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
    assert sequences.cumulative_lengths.dtype == torch.int32
    for members, places in zip(similar(lengths), groups.places, strict=True):
        assert len(members) == len(places)
        for sample, row in zip(members, places, strict=True):
            start = sum(lengths[:sample])
            assert row[: lengths[sample]].tolist() == list(range(start, start + lengths[sample]))
            assert (row[lengths[sample] :] == start).all()
            assert lengths[sample] >= min(0.8 * places.shape[1], places.shape[1] - 16)


def test_what_a_packed_model_is_called_with_worked_by_hand():
    input_ids = torch.tensor([[5, 6, 7], [8, 0, 0], [0, 0, 0], [9, 3, 0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False] * 3, [True, True, False]])
    inputs = packed_inputs(input_ids, mask)
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert inputs["cu_seq_lens_q"].tolist() == [0, 3, 4, 6]
    assert inputs["max_length_q"] == 3


# ---------------------------------------------------------------- the kernel of CUDA


def reference_varlen(
    query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """The documented meaning of torch's kernel, token by token."""
    assert enable_gqa
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    assert torch.equal(cu_q, cu_k)
    assert max_q == max_k == cu_q.diff().max()
    assert window_size[1] == 0
    ratio = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(ratio, 1), value.repeat_interleave(ratio, 1)
    rows = []
    for start, end in zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False):
        for token in range(start, end):
            first = start if window_size[0] < 0 else max(start, token - window_size[0])
            scores = torch.einsum("hd,khd->hk", query[token], key[first : token + 1])
            weights = (scores * (scale or query.shape[-1] ** -0.5)).softmax(-1)
            rows.append(torch.einsum("hk,khd->hd", weights, value[first : token + 1]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["like SmolLM2", "like Gemma 3"])
@pytest.mark.parametrize("is_mixed", [False, True], ids=["bfloat16", "autocast"])
def test_the_kernel_of_cuda_is_asked_for_what_is_meant(name, is_mixed, monkeypatch):
    inputs = padded()
    networks = [PolicyNetwork(built(PACKED[name]), is_packed=is_packed) for is_packed in (False, True)]
    exact = networks[0](*inputs)
    if not is_mixed:
        networks = [network.bfloat16() for network in networks]
    monkeypatch.setattr(PackedSequences, "has_flash_kernel", property(lambda _: True, lambda *_: None), raising=False)
    monkeypatch.setattr(packed_attention, "varlen_attn", kernel := Mock(side_effect=reference_varlen))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_mixed):
        expected, found = (network(*inputs) for network in networks)
    assert kernel.call_count == 2, "once a layer"
    error = (expected - exact).abs().mean()
    assert 1e-3 < error < 0.1
    assert (found - expected).abs().mean() < 2 * error


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["like SmolLM2", "like Gemma 3"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_packed_equals_padded_on_a_gpu(name, precision):
    inputs = [tensor.cuda() for tensor in padded()]
    exact = logprobs_and_gradients(PolicyNetwork(built(PACKED[name]), is_packed=False), padded())
    networks = [PolicyNetwork(built(PACKED[name]), is_packed=is_packed).cuda() for is_packed in (False, True)]
    if precision == "bfloat16":
        networks = [network.bfloat16() for network in networks]
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "autocast"):
        expected, found = (network(*inputs).cpu() for network in networks)
    error = (expected - exact[0]).abs().mean()
    assert error < (1e-4 if precision == "float32" else 0.1)
    assert (found - exact[0]).abs().mean() < 2 * error + 1e-5
    found.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in networks[1].parameters())
