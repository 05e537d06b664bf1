"""An objective inside TRL's GRPOTrainer, by its one method that computes the loss.

    pip install 'drpo-lightning[trl]'
    python examples/in_trl.py

Run with TRL 1.16: `_compute_loss` is internal to TRL and may change with any version. With `use_vllm=True`, which was
not run, mu is what vLLM sampled from; without, the trainer's policy at the rollout, which generated. The aggregation is
that of TRL's `dapo`: the sum over tokens / completion tokens of the update.
"""

import random
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from drpo_lightning.objectives import DRPO, Objective

MODEL = "models/arithmetic"


class ObjectiveTrainer(GRPOTrainer):
    """GRPOTrainer with an objective of `drpo_lightning`."""

    objective: Objective = DRPO(delta=0.2)

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        num_tokens = inputs["completion_ids"].shape[1]
        policy_logprobs, *_ = self._get_per_token_logps_and_entropies(model, ids, attention_mask, num_tokens)
        at_rollout = inputs.get("old_per_token_logps")
        at_rollout = policy_logprobs.detach() if at_rollout is None else at_rollout
        mask = inputs["completion_mask"].bool()
        output = self.objective(
            policy_logprobs,
            inputs.get("sampling_per_token_logps", at_rollout),
            inputs["advantages"][:, None].expand_as(mask),
            mask,
        )
        for name in ("min", "max"):
            extreme = getattr(output.grad_weight[~output.grad_weight.isnan()], name)
            self._metrics["train"][f"grad_weight/{name}"].append(extreme().item() if output.loss.any() else 1.0)
        share = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return output.loss.sum() * self.accelerator.num_processes / (inputs["num_items_in_batch"] * share)


def exact_match(completions: list[str], answer: list[str], **_: Any) -> list[float]:  # noqa: ANN401
    """1 for the right sum."""
    return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]


def main() -> None:
    """Trains for a few rollouts of four updates each."""
    random.seed(0)
    pairs = [(random.randint(10, 99), random.randint(10, 99)) for _ in range(512)]
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]
    settings = GRPOConfig(
        output_dir="runs/in_trl",
        use_cpu=True,
        bf16=False,  # float32, as everywhere here
        learning_rate=1.5e-4,
        per_device_train_batch_size=64,
        num_generations=8,
        steps_per_generation=4,  # updates on each rollout
        max_completion_length=5,
        max_steps=24,
        logging_steps=4,
        save_strategy="no",
        report_to="none",
    )
    trainer = ObjectiveTrainer(MODEL, exact_match, args=settings, train_dataset=Dataset.from_list(rows))
    trainer.train()


if __name__ == "__main__":
    main()
