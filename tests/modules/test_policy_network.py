"""Logprobs of completion tokens equal a plain log-softmax of the model's logits, as do gradients; entropies do too."""

import copy

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from drpo_lightning.functional import linear_logprobs
from drpo_lightning.modules import PolicyNetwork
from drpo_lightning.modules.logprob_backends import TokenLogprobs

VOCABULARY = 50
SMALL_CHUNKS = TokenLogprobs(chunk_bytes=1)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}
CONFIGS = {
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "softcapped": Gemma2Config(**SIZES, final_logit_softcapping=5.0, sliding_window=8),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def language_model(request):
    return built(request.param)


@pytest.fixture(scope="module")
def llama():
    return built(CONFIGS["untied"])


def built(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def padded(lengths=((3, 5), (1, 2), (4, 0), (2, 7)), seed=0):
    """Rows of a prompt and a completion of given lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(map(sum, lengths)))
    places = torch.arange(shape[1]).expand(shape)
    prompt, total = (torch.tensor(column)[:, None] for column in ([p for p, _ in lengths], [p + c for p, c in lengths]))
    return (
        torch.randint(VOCABULARY, shape, generator=generator),
        places < total,
        (places >= prompt) & (places < total),
    )


def naive_logprobs(language_model, input_ids, completion_mask, temperature=1.0):
    """One row and one token at a time, without padding."""
    rows = []
    for ids, sampled in zip(input_ids, completion_mask, strict=True):
        length = int(sampled.nonzero().max()) + 1 if sampled.any() else 1
        logits = language_model(ids[None, :length]).logits[0].float() / temperature
        row = [
            logits[t - 1].log_softmax(-1)[ids[t]] if t < length and sampled[t] else torch.tensor(0.0)
            for t in range(len(ids))
        ]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def gradients(language_model, loss):
    language_model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad for name, parameter in language_model.named_parameters()}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_logprobs_equal_a_plain_log_softmax(language_model, temperature):
    input_ids, attention_mask, completion_mask = padded()
    logprobs = PolicyNetwork(language_model, temperature=temperature)(input_ids, attention_mask, completion_mask)
    assert logprobs.dtype == torch.float32
    assert logprobs.shape == input_ids.shape
    expected = naive_logprobs(language_model, input_ids, completion_mask, temperature)
    torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-5)
    assert (logprobs[~completion_mask] == 0).all()
    assert (logprobs[completion_mask] < 0).all()


def test_gradients_equal_those_of_a_plain_log_softmax(language_model):
    input_ids, attention_mask, completion_mask = padded()
    factors = torch.randn(input_ids.shape, generator=torch.Generator().manual_seed(1))
    network = PolicyNetwork(language_model, temperature=1.3)
    ours = gradients(language_model, (factors * network(input_ids, attention_mask, completion_mask)).sum())
    naive = naive_logprobs(language_model, input_ids, completion_mask, 1.3)
    theirs = gradients(language_model, (factors * naive).sum())
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


def test_padding_changes_nothing(language_model):
    network = PolicyNetwork(language_model)
    input_ids, attention_mask, completion_mask = padded()
    together = network(input_ids, attention_mask, completion_mask)
    for i, length in enumerate(attention_mask.sum(1)):
        row = (slice(i, i + 1), slice(0, int(length)))
        alone = network(input_ids[row], attention_mask[row], completion_mask[row])
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


def test_what_stands_in_the_padding_is_never_seen(language_model):
    network = PolicyNetwork(language_model)
    input_ids, attention_mask, completion_mask = padded()
    other = torch.where(attention_mask, input_ids, (input_ids + 7) % VOCABULARY)
    assert not torch.equal(other, input_ids)
    first, second = (network(ids, attention_mask, completion_mask) for ids in (input_ids, other))
    assert torch.equal(first, second)


@pytest.mark.parametrize("num_ids", [1, 7, 49, 50])
def test_the_size_of_chunks_changes_nothing(llama, num_ids, monkeypatch):
    monkeypatch.setattr(linear_logprobs, "COLUMN_MULTIPLE", num_ids)
    inputs = padded()
    whole, chunked = PolicyNetwork(llama), PolicyNetwork(llama, token_logprobs=SMALL_CHUNKS)
    torch.testing.assert_close(whole(*inputs), chunked(*inputs), rtol=1e-5, atol=1e-6)
    ours, theirs = (gradients(llama, network(*inputs).square().sum()) for network in (chunked, whole))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3)


def test_a_linear_head_never_makes_all_logits_at_once(llama, monkeypatch):
    monkeypatch.setattr(linear_logprobs, "COLUMN_MULTIPLE", 20)
    network = PolicyNetwork(llama, token_logprobs=SMALL_CHUNKS)
    sizes = set()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.update(tuple(t.shape) for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    with Sizes():
        network(*padded()).sum().backward()
    assert {(14, 20), (14, 10)} <= sizes
    assert not any(size[-1:] == (VOCABULARY,) for size in sizes)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_soft_cap_is_noticed_and_a_linear_head_is_too(name):
    assert PolicyNetwork(built(CONFIGS[name])).is_head_linear == (name != "softcapped")


def test_a_soft_cap_is_noticed_in_an_untrained_model_too():
    config = Gemma2Config(**(SIZES | {"initializer_range": 0.02}), final_logit_softcapping=30.0, sliding_window=8)
    language_model = built(config)
    network = PolicyNetwork(language_model)
    with torch.no_grad():
        language_model.lm_head.weight.mul_(100)
    input_ids, attention_mask, completion_mask = padded()
    expected = naive_logprobs(language_model, input_ids, completion_mask)
    torch.testing.assert_close(network(input_ids, attention_mask, completion_mask), expected, rtol=1e-3, atol=1e-3)


def test_the_first_token_of_a_row_is_never_scored(language_model):
    input_ids, attention_mask, completion_mask = padded(((0, 4), (1, 3)))
    assert completion_mask[0, 0]
    logprobs = PolicyNetwork(language_model)(input_ids, attention_mask, completion_mask)
    assert logprobs[:, 0].tolist() == [0.0, 0.0]
    assert (logprobs[0, 1:] < 0).all()
    assert completion_mask[0, 0], "the caller's mask was changed"


def test_a_batch_without_completion_tokens_has_zero_gradients(language_model):
    input_ids, attention_mask, completion_mask = padded(((3, 0), (5, 0)))
    logprobs = PolicyNetwork(language_model)(input_ids, attention_mask, completion_mask)
    assert (logprobs == 0).all()
    found = gradients(language_model, logprobs.sum())
    assert all(gradient is not None and (gradient == 0).all() for gradient in found.values())


def other_tokens(input_ids, k=3):
    return torch.randint(VOCABULARY, (*input_ids.shape, k), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("num_ids", [4, 50])
def test_other_tokens_are_scored_in_the_place_of_each(language_model, num_ids, monkeypatch):
    monkeypatch.setattr(linear_logprobs, "COLUMN_MULTIPLE", num_ids)
    input_ids, attention_mask, completion_mask = padded()
    others = other_tokens(input_ids)
    network = PolicyNetwork(language_model, temperature=1.3, token_logprobs=SMALL_CHUNKS)
    logprobs = network(input_ids, attention_mask, completion_mask, others[completion_mask])
    assert logprobs.shape == (completion_mask.sum(), 4)
    assert logprobs.dtype == torch.float32
    for i, (row, column) in enumerate(completion_mask.nonzero().tolist()):
        logits = language_model(input_ids[row : row + 1, :column]).logits[0, -1].float() / 1.3
        targets = torch.cat([input_ids[row, column, None], others[row, column]])
        torch.testing.assert_close(logprobs[i], logits.log_softmax(-1)[targets], rtol=1e-4, atol=1e-5)


def test_what_else_is_scored_changes_neither_the_tokens_own_logprobs_nor_their_gradient(language_model):
    input_ids, attention_mask, completion_mask = padded()
    factors = torch.randn(input_ids.shape, generator=torch.Generator().manual_seed(1))
    network = PolicyNetwork(language_model, temperature=1.3)
    plain = network(input_ids, attention_mask, completion_mask)
    several = network(input_ids, attention_mask, completion_mask, other_tokens(input_ids)[completion_mask])
    torch.testing.assert_close(several[:, 0], plain[completion_mask], rtol=0.0, atol=1e-5)
    ours = gradients(language_model, (factors[completion_mask] * several[:, 0]).sum())
    theirs = gradients(language_model, (factors * plain).sum())
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


def test_what_else_is_scored_has_no_gradient(language_model):
    input_ids, attention_mask, completion_mask = padded()
    others = other_tokens(input_ids)[completion_mask]
    logprobs = PolicyNetwork(language_model)(input_ids, attention_mask, completion_mask, others)
    assert logprobs[:, 1:].abs().min() > 0
    # Times 0, the token's own logprob ties the sum to the graph.
    found = gradients(language_model, logprobs[:, 1:].sum() + 0 * logprobs[:, 0].sum())
    assert all((gradient == 0).all() for gradient in found.values())


def test_a_batch_without_completion_tokens_scores_nothing_else_either(language_model):
    input_ids, attention_mask, completion_mask = padded(((3, 0), (5, 0)))
    others = other_tokens(input_ids)[completion_mask]
    logprobs = PolicyNetwork(language_model)(input_ids, attention_mask, completion_mask, others)
    assert logprobs.shape == (0, 4)
    assert all((gradient == 0).all() for gradient in gradients(language_model, logprobs.sum()).values())


SOFTCAPPED_HEAD = Gemma2Config(
    **SIZES,
    final_logit_softcapping=5.0,
    attn_logit_softcapping=None,
    sliding_window=8,
    layer_types=["full_attention"] * 2,
)


@pytest.fixture(params=[True, False], ids=["packed", "padded"])
def is_packed(request):
    return request.param


@pytest.fixture(params=["linear head", "softcapped head"])
def packable(request):
    return built(CONFIGS["tied"] if request.param == "linear head" else SOFTCAPPED_HEAD)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_entropies_are_those_of_the_whole_distribution(packable, is_packed, temperature):
    language_model, exact = packable, copy.deepcopy(packable).double()
    input_ids, attention_mask, completion_mask = padded()
    network = PolicyNetwork(language_model, temperature=temperature, token_logprobs=SMALL_CHUNKS, is_packed=is_packed)
    entropies = network(input_ids, attention_mask, completion_mask, returns_entropy=True)
    assert (entropies.dtype, entropies.shape) == (torch.float32, input_ids.shape)
    assert (entropies[~completion_mask] == 0).all()
    assert not entropies.requires_grad
    for row, column in completion_mask.nonzero().tolist():
        logits = exact(input_ids[row : row + 1, :column]).logits[0, -1].detach() / temperature
        p = logits.exp() / logits.exp().sum()
        expected = -(p * p.log()).sum()
        torch.testing.assert_close(entropies[row, column].double(), expected, rtol=1e-4, atol=1e-4)


def test_a_batch_without_completion_tokens_has_no_entropies(language_model):
    input_ids, attention_mask, completion_mask = padded(((3, 0), (5, 0)))
    entropies = PolicyNetwork(language_model)(input_ids, attention_mask, completion_mask, returns_entropy=True)
    assert torch.equal(entropies, torch.zeros(input_ids.shape))


def test_entropies_take_no_other_tokens(llama):
    input_ids, attention_mask, completion_mask = padded()
    others = other_tokens(input_ids)[completion_mask]
    with pytest.raises(ValueError, match=r"`returns_entropy` .* must be False with `topk_ids`"):
        PolicyNetwork(llama)(input_ids, attention_mask, completion_mask, others, returns_entropy=True)


@pytest.mark.parametrize("returns_entropy", [False, True])
def test_after_the_body_no_tokens_are_counted(packable, is_packed, returns_entropy):
    """A GPU would be waited for."""
    network = PolicyNetwork(packable, is_packed=is_packed)
    after = []

    class After(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            is_by_mask = name == "index" and args[1][0].dtype == torch.bool
            after.append("index by mask" if is_by_mask else name)
            return func(*args, **(kwargs or {}))

    begin = packable.base_model.register_forward_hook(lambda *_: after.clear())
    try:
        with After():
            network(*padded(), returns_entropy=returns_entropy)
    finally:
        begin.remove()
    assert "index_select" in after
    assert not {"index by mask", "nonzero", "masked_select", "_local_scalar_dense"} & set(after)


def test_bfloat16_weights_give_float32_logprobs(llama):
    inputs = padded()
    coarse = built(CONFIGS["untied"]).bfloat16()
    others = other_tokens(inputs[0])[inputs[2]]
    plain, several = PolicyNetwork(coarse)(*inputs), PolicyNetwork(coarse)(*inputs, others)
    assert plain.dtype == several.dtype == torch.float32
    torch.testing.assert_close(several[:, 0], plain[inputs[2]], rtol=0.0, atol=1e-5)


def test_logprobs_are_float32_where_lightning_makes_bfloat16_the_default(llama):
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert PolicyNetwork(llama)(*padded()).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_trained_model_agrees_with_its_logits(model_folder):
    language_model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    network = PolicyNetwork(language_model, temperature=1.5)
    assert network.is_head_linear
    input_ids, attention_mask, completion_mask = padded()
    expected = naive_logprobs(language_model, input_ids, completion_mask, 1.5)
    found = network(input_ids, attention_mask, completion_mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
