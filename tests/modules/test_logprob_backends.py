"""Every backend gives the same logprobs, gradients and training; one that cannot run here says what to do."""

import contextlib
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy

from drpo_lightning.callbacks import RunSummary
from drpo_lightning.errors import SettingError
from drpo_lightning.functional import linear_logprobs
from drpo_lightning.modules import LoRA
from drpo_lightning.modules.logprob_backends import TokenLogprobs, choose_backend
from drpo_lightning.objectives import TopKDPPO

ROOT = Path(__file__).parents[2]
TOKENS, WIDTH, VOCAB = 19, 8, 300
CPU_BACKENDS = ["chunked", "linear_cross_entropy"]
HAS_LINEAR_CROSS_ENTROPY = hasattr(torch.nn.functional, "linear_cross_entropy")
needs_pytorch = pytest.mark.skipif(not HAS_LINEAR_CROSS_ENTROPY, reason="PyTorch 2.13 and later has it")


@pytest.fixture(params=["chunked", pytest.param("linear_cross_entropy", marks=needs_pytorch)])
def backend(request):
    """In chunks of 128 ids, or of three tokens."""
    return TokenLogprobs(request.param, chunk_bytes=4 * VOCAB * 3)


def head(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, WIDTH), (VOCAB, WIDTH), (VOCAB,)]
    leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return leaves, torch.randint(VOCAB, (TOKENS,), generator=generator), torch.randn(TOKENS, generator=generator)


def reference(leaves, targets, upstream, temperature):
    """Logprobs and gradients by autograd in float64."""
    hidden, weight, bias = (leaf.detach().double().requires_grad_() for leaf in leaves)
    logprobs = ((hidden @ weight.T + bias) / temperature).log_softmax(1).gather(1, targets[:, None])[:, 0]
    return logprobs.detach(), torch.autograd.grad((logprobs * upstream).sum(), [hidden, weight, bias])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_equal_autograds_in_float64(backend, temperature):
    (hidden, weight, bias), targets, upstream = head()
    upstream[::2] = 0
    got = backend(hidden, weight, targets, bias=bias, temperature=temperature)
    grads = torch.autograd.grad((got * upstream).sum(), [hidden, weight, bias])
    expected, expected_grads = reference((hidden, weight, bias), targets, upstream, temperature)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    for grad, formula in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), formula, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision_rounds_factors_and_gradients_and_no_logprob(backend, precision):
    is_mixed = precision == "bf16-mixed"
    leaves, targets, upstream = head(torch.float32 if is_mixed else torch.bfloat16)
    hidden, weight, bias = leaves
    with torch.autocast("cpu", torch.bfloat16) if is_mixed else contextlib.nullcontext():
        got = backend(hidden, weight, targets, bias=bias, temperature=2.0)
    got.backward(upstream)
    expected, grads = reference((hidden.bfloat16(), weight.bfloat16(), bias), targets, upstream, 2.0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    for leaf, formula in zip(leaves, grads, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        torch.testing.assert_close(leaf.grad.double(), formula, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("shape", [(TOKENS, 4), (0,), (0, 4)])
def test_several_targets_and_no_tokens_are_any_backends(backend, shape):
    (hidden, weight, bias), _, _ = head()
    hidden = hidden[: shape[0]]
    targets = torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))
    got = backend(hidden, weight, targets, bias=bias)
    logprobs = (hidden @ weight.T + bias).log_softmax(1)
    expected = logprobs.gather(1, targets.view(shape[0], shape[1] if len(shape) == 2 else 1)).view(shape)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_gradient_the_logprobs_are_the_same(backend, mode):
    (hidden, weight, bias), targets, _ = head()
    with mode():
        got = backend(hidden, weight, targets, bias=bias)
    assert not got.requires_grad
    assert torch.equal(got, backend(hidden, weight, targets, bias=bias))


def test_backward_passes_add_up(backend):
    (hidden, weight, bias), targets, upstream = head()
    got = backend(hidden, weight, targets, bias=bias)
    got.backward(upstream, retain_graph=True)
    once = weight.grad.clone()
    got.backward(upstream)
    torch.testing.assert_close(weight.grad, 2 * once)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def strategy(name):
    return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1) if name == "fsdp2" else "auto"


SETUPS = {
    "tied": {},
    "fsdp2": {"trainer": {"strategy": "fsdp2"}},
    "bf16-mixed": {"trainer": {"precision": "bf16-mixed"}},
    "bf16-true": {"trainer": {"precision": "bf16-true"}},
    "fsdp2 bf16-mixed": {"trainer": {"strategy": "fsdp2", "precision": "bf16-mixed"}},
    "adapters": {"module": {"peft": LoRA(r=4)}},
    "topk": {"module": {"objective": TopKDPPO()}},
    "accumulated": {"trainer": {"accumulate_grad_batches": 2}},
}


@needs_pytorch
@pytest.mark.filterwarnings("ignore:`model.optimizer` lr")
@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_backends_train_the_same_policy(make_run, monkeypatch, setup):
    monkeypatch.setattr(linear_logprobs, "COLUMN_MULTIPLE", 40)
    trainer = setup.get("trainer", {})
    moves = []
    for name in CPU_BACKENDS:
        run = make_run(
            trainer=trainer | {"strategy": strategy(trainer.get("strategy"))},
            module={"logprob_backend": name, "logprob_chunk_mib": 1, "optimizer": sgd} | setup.get("module", {}),
        )
        watcher = Start()
        run.trainer.callbacks.append(watcher)
        torch.manual_seed(0)
        run.fit()
        assert run.module.network.token_logprobs.backend == name
        moves.append(flat(run.module) - watcher.weights)
    tolerance = 2**-6 if "bf16" in trainer.get("precision", "") else 1e-4
    assert moves[0].norm() > 0
    assert (moves[1] - moves[0]).norm() < tolerance * moves[0].norm()


class Start(Callback):
    def on_train_start(self, trainer, pl_module):
        self.weights = flat(pl_module)


def flat(module):
    return torch.cat([tensor.flatten().float().clone() for _, tensor in module.named_weights()])


def test_by_default_it_is_ours_on_every_device():
    for device in ("cpu", "cuda", "mps"):
        assert choose_backend("auto", torch.device(device)).backend == "chunked"


def test_an_older_pytorch_is_told_what_to_take(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    with pytest.raises(SettingError, match=r"needs PyTorch 2.13 or later, this is .*; take `chunked`"):
        choose_backend("linear_cross_entropy", torch.device("cpu"))


def test_cut_cross_entropy_needs_a_gpu():
    with pytest.raises(SettingError, match="needs a CUDA device, this is cpu; take `chunked`"):
        choose_backend("cut_cross_entropy", torch.device("cpu"))


@pytest.mark.parametrize(("kernels", "is_taken"), [(None, False), ("CCE", False), ("CCE, CCE_EXACT", True)])
def test_cut_cross_entropy_without_exact_gradients_is_refused(tmp_path, monkeypatch, kernels, is_taken):
    if kernels is not None:
        package = tmp_path / "cut_cross_entropy.py"
        package.write_text(f"import enum\nLinearCrossEntropyImpl = enum.Enum('LinearCrossEntropyImpl', '{kernels}')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cut_cross_entropy", raising=False)
    if is_taken:
        assert choose_backend("cut_cross_entropy", torch.device("cuda")).backend == "cut_cross_entropy"
        monkeypatch.delitem(sys.modules, "cut_cross_entropy")
        return
    with pytest.raises(SettingError, match=r"pip install 'cut-cross-entropy @ git\+https://github.com/apple"):
        choose_backend("cut_cross_entropy", torch.device("cuda"))
    monkeypatch.delitem(sys.modules, "cut_cross_entropy", raising=False)


def test_a_backend_that_cannot_run_is_refused_before_the_model_is_loaded(make_run, monkeypatch):
    run = make_run(module={"logprob_backend": "cut_cross_entropy"})
    monkeypatch.setattr(run.module, "configure_model", lambda: pytest.fail("loaded"))
    with pytest.raises(SettingError, match="needs a CUDA device"):
        run.fit()


def test_chunks_need_memory(make_run):
    with pytest.raises(ValueError, match=r"`model\.logprob_chunk_mib` must be positive, got 0"):
        make_run(module={"logprob_chunk_mib": 0})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, r"chunked, 256 MiB of logits at a time \(auto: .*\)"),
        ({"logprob_backend": "chunked", "logprob_chunk_mib": 3}, r"chunked, 3 MiB of logits at a time \(set\)"),
    ],
)
def test_the_start_of_a_run_says_which_one_runs_and_why(make_run, capsys, settings, expected):
    make_run(RunSummary(), module=settings).fit()
    (line,) = re.findall(r"^logprobs: +(.*)$", capsys.readouterr().out, re.M)
    assert re.fullmatch(expected, line)


def test_the_benchmark_runs_and_all_backends_are_right(monkeypatch, capsys):
    backends = ["plain", "half", *CPU_BACKENDS[: 1 + HAS_LINEAR_CROSS_ENTROPY], "cut_cross_entropy"]
    arguments = ["--tokens=64", "--hidden=16", "--vocabulary=500", "--repeats=1", "--backends", *backends]
    monkeypatch.setattr(sys, "argv", ["head.py", *arguments])
    runpy.run_path(str(ROOT / "benchmarks" / "head.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    (title,) = (number for number, line in enumerate(lines) if "median ms" in line)
    rows = {line.split()[0]: [float(value) for value in line.split()[-3:]] for line in lines[title + 1 :]}
    assert list(rows) == backends[:-1]  # the last needs a GPU
    assert max(max(errors) for errors in rows.values()) < 1e-4
