"""Model FLOPs: what PyTorch counts in the products of a real model; peaks of the devices that drivers name."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from drpo_lightning.metrics.model_flops import PEAK_TFLOPS, ModelSize, model_size, peak_flops, product_dtype


def shapes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def size_of(model):
    return model_size(model, shapes(model))


@pytest.fixture(scope="module")
def model(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="eager", dtype=torch.float32)


def counted(model, lengths, num_head_tokens, *, backward):
    """What PyTorch counts for sequences one by one; the head is asked at the last tokens of each."""
    with FlopCounterMode(display=False) as counter:
        for length in lengths:
            logits = model(torch.ones(1, length, dtype=torch.long), use_cache=False, logits_to_keep=num_head_tokens)[0]
            if backward:
                logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("backward", "times"), [(False, 1), (True, 3)])
def test_the_operations_are_those_that_pytorch_counts(model, backward, times):
    lengths, head = [7, 31, 12], 5
    sums = {"num_tokens": sum(lengths), "num_head_tokens": head * len(lengths)}
    size = size_of(model)
    method = size.training_flops if backward else size.forward_flops
    squares = sum(length**2 for length in lengths)
    # Eager attention multiplies the pairs that the mask leaves out, too: all T^2 of them.
    left_out = times * 2 * size.attention_width * squares
    expected = counted(model, lengths, head, backward=backward) - left_out
    assert method(**sums, squared_lengths=squares) == pytest.approx(expected, rel=1e-9)


def test_the_size_worked_by_hand(model):
    hidden, between, vocabulary, layers = 128, 352, 98, 2
    body = layers * (4 * hidden**2 + 3 * hidden * between)
    assert size_of(model) == ModelSize(body, vocabulary * hidden, layers * hidden, body + vocabulary * hidden)


def test_a_head_of_its_own_counts_as_a_tied_one():
    config = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    tied, untied = (LlamaForCausalLM(LlamaConfig(**config, tie_word_embeddings=tied)) for tied in (True, False))
    assert size_of(tied) == size_of(untied)
    assert size_of(tied).head_parameters == 50 * 8


def test_frozen_parameters_take_no_gradient_of_their_own():
    whole, adapters = ModelSize(900, 100, 10, 1000), ModelSize(900, 100, 10, 50)
    lengths = {"num_tokens": 20, "num_head_tokens": 20, "squared_lengths": 400}
    attention = 6 * 10 * 400
    assert whole.training_flops(**lengths) == 6 * 1000 * 20 + attention
    assert adapters.training_flops(**lengths) == pytest.approx((4 * 1000 + 2 * 50) * 20 + attention)


def test_a_mixture_of_experts_has_no_size():
    config = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    with torch.device("meta"):
        assert size_of(MixtralForCausalLM(MixtralConfig(**config))) is None


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA H200 NVL", "bfloat16", 835.5),
        ("NVIDIA A100-SXM4-80GB", "tfloat32", 156),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA L4", "float16", 121),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA GeForce GTX 1080", "float32", None),
    ],
)
def test_the_peak_of_a_device_by_its_name(name, dtype, tflops):
    assert peak_flops(name, dtype) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_half_precision_is_never_slower_than_tf32_nor_that_than_float32():
    for peaks in PEAK_TFLOPS.values():
        order = [peaks[name] for name in ("float32", "tfloat32", "bfloat16") if name in peaks]
        assert order == sorted(order)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", "bfloat16"), ("bf16-true", "bfloat16"), ("16-mixed", "float16")]
)
def test_the_precision_of_the_products(precision, dtype):
    assert product_dtype(precision) == dtype


def test_float32_products_are_in_tf32_where_that_is_allowed():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert product_dtype("32-true") == "float32"
        torch.set_float32_matmul_precision("high")
        assert product_dtype("32-true") == "tfloat32"
    finally:
        torch.set_float32_matmul_precision(before)
