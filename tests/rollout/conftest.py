"""Both engines on the small model, started once."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from drpo_lightning.rollout import RolloutEngine, TransformersEngine, VLLMEngine

MODEL = str(Path(__file__).parents[2] / "models" / "arithmetic")


def start(engine: RolloutEngine) -> RolloutEngine:
    engine.start(MODEL, device=torch.device("cpu"), num_ranks=1, seed=0)
    return engine


@pytest.fixture(scope="session")
def vllm_engine():
    engine = start(VLLMEngine(process="own", dtype="float32", enforce_eager=True))
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def transformers_engine():
    return start(TransformersEngine())


@pytest.fixture(scope="session")
def fp8_engine():
    return start(TransformersEngine("fp8"))


@pytest.fixture(params=["transformers", "vllm"])
def engine(request, policy):
    """Each engine, with the weights of `policy`."""
    engine = request.getfixturevalue(f"{request.param}_engine")
    engine.load_weights(policy.state_dict().items())
    return engine


@pytest.fixture
def policy():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture
def perturbed():
    """The policy with other weights: its logprobs differ by whole nats."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * 0.3)
    return model
