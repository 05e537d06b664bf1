"""The scripts of examples/ are short, say how they are run, and run on the small model."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPTS = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
PRINTED = {
    "custom_callback": r"completions/distinct_fraction 0\.\d+  certain/shift_mean 0\.\d+",
    "custom_engine": r"engine against trainer: \d\.\de[+-]\d\d nats",
    "custom_objective": r"GaussianRegion +1\.00 +1\.00 +0\.61 +0\.14 +0\.00",
    "custom_reward": r"reward/rightdigits/mean +0\.\d+",
    "in_trl": r"grad_weight/min",
    "own_loop": r"rollout 10  reward 0\.\d+  w -?\d+\.\d+ to \d+\.\d+",
    "plain_lightning": r"after 28 updates: reward 0\.\d+",
}
"""What a script says when it has done what it shows."""


def loaded(name):
    """The module of an example, without running it."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", SCRIPTS[name])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_is_short_and_says_how_it_is_run(name):
    text = SCRIPTS[name].read_text()
    assert len(text.splitlines()) < 80
    assert f"    python examples/{name}.py" in ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("name", sorted(SCRIPTS.keys() - {"in_trl"}))
def test_an_example_loads(name):
    loaded(name)


def test_an_objective_of_ones_own_is_one():
    objective = loaded("custom_objective").GaussianRegion(delta=0.2)
    policy_logprobs = torch.linspace(-3, -0.01, 50).requires_grad_()
    rollout_logprobs = torch.full((50,), 0.4).log()
    advantages = torch.where(torch.arange(50) % 2 == 0, 1.0, -0.5)
    output = objective(policy_logprobs, rollout_logprobs, advantages, torch.ones(50, dtype=torch.bool))
    output.loss.sum().backward()
    shift = policy_logprobs.detach().double().exp() - rollout_logprobs.double().exp()
    weight = torch.where(shift * advantages > 0, (-((shift / 0.2) ** 2) / 2).exp(), 1.0)
    torch.testing.assert_close(output.grad_weight.double(), weight, rtol=1e-5, atol=1e-6)
    ratio = (policy_logprobs.detach() - rollout_logprobs).exp()
    torch.testing.assert_close(-policy_logprobs.grad.double(), weight * ratio * advantages, rtol=1e-5, atol=1e-6)


@pytest.mark.docs
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_runs(name, tmp_path):
    if name == "in_trl":
        pytest.importorskip("trl", reason="pip install 'drpo-lightning[trl]'")
    (tmp_path / "models").symlink_to(ROOT / "models")
    call = [sys.executable, str(SCRIPTS[name])]
    run = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert re.search(PRINTED[name], run.stdout + run.stderr)


@pytest.mark.docs
@pytest.mark.filterwarnings("default")
def test_in_trl_the_clipped_ratio_is_trls_own(tmp_path):
    trl = pytest.importorskip("trl", reason="pip install 'drpo-lightning[trl]'")
    from datasets import Dataset

    from drpo_lightning.objectives import ClippedRatio

    example = loaded("in_trl")

    class Clipped(example.ObjectiveTrainer):
        objective = ClippedRatio(clip_low=0.2, clip_high=0.2)

    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 18) for b in range(40, 48)]
    weights = []
    for trainer in (trl.GRPOTrainer, Clipped):
        settings = trl.GRPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            optim="sgd",  # Adam would hide a wrong scale
            learning_rate=0.1,
            max_grad_norm=0.0,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            num_generations=8,
            steps_per_generation=4,
            max_completion_length=5,
            max_steps=4,
            loss_type="dapo",
            epsilon=0.2,
            epsilon_high=0.2,
            save_strategy="no",
            report_to="none",
        )
        run = trainer(
            str(ROOT / example.MODEL), example.exact_match, args=settings, train_dataset=Dataset.from_list(rows)
        )
        run.train()
        weights.append({name: tensor.clone() for name, tensor in run.model.state_dict().items()})
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-4, atol=1e-5)
