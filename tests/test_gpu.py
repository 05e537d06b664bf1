"""The main job on a CUDA GPU. Run with `pytest -m gpu` where there is one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from drpo_lightning.batch import Sampling
from drpo_lightning.rollout import VLLMEngine

ROOT = Path(__file__).parent.parent
# vLLM, and PyTorch of the version that it pins, warn of what they do themselves.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


def test_the_quickstart_runs_and_learns(tmp_path):
    command = [sys.executable, "-m", "drpo_lightning", "fit", "--config=configs/quickstart.yaml"]
    command += ["--trainer.max_epochs=10", "--trainer.check_val_every_n_epoch=10", "--trainer.accelerator=gpu"]
    command += [f"--trainer.logger.init_args.save_dir={tmp_path}", f"--trainer.default_root_dir={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    before, after = map(float, re.search(r"held-out pass@1: (\S+) before -> (\S+) after", result.stdout).groups())
    assert after > before + 0.1


@pytest.mark.parametrize("process", ["in_process", "own"])
def test_a_sleeping_engine_frees_memory_and_wakes_with_new_weights(model_folder, process):
    from transformers import AutoModelForCausalLM

    engine = VLLMEngine(process=process, dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3)
    engine.start(model_folder, device=torch.device("cuda", 0), num_ranks=1, seed=0)
    try:
        awake = torch.cuda.mem_get_info()[0]
        engine.sleep()
        assert torch.cuda.mem_get_info()[0] > awake + 2**30
        engine.wake()
        policy = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).cuda()
        engine.load_weights(policy.state_dict().items())
        prompt = [20, 21, 14, 22, 23, 32]
        group = engine.generate([prompt], Sampling(max_tokens=8), num_samples=4, stop_token_ids=[1])[0]
        for completion in group:
            ids = torch.tensor([prompt + completion.token_ids], device="cuda")
            with torch.no_grad():
                logprobs = policy(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=5e-3)
    finally:
        engine.close()
