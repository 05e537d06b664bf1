"""The objectives in a training loop of one's own: transformers and PyTorch, without Lightning.

    python examples/own_loop.py

Sample with log mu, score, take advantages within each prompt's group, and make several updates on the same samples:
from the second update on pi is not mu, and the objective decides what each token's gradient is worth.
"""

import random

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from drpo_lightning.functional import aggregate_loss, group_advantages
from drpo_lightning.objectives import DRPO

MODEL = "models/arithmetic"
NUM_PROMPTS, GROUP_SIZE, NUM_ROLLOUTS, NUM_UPDATES, MAX_TOKENS = 32, 8, 10, 4, 5


def token_logprobs(model: PreTrainedModel, ids: Tensor, num_prompt: int) -> Tensor:
    """Log pi of the completion tokens `[batch, completion]`, in float32, at temperature 1."""
    logits = model(ids).logits[:, num_prompt - 1 : -1].float()
    return logits.log_softmax(-1).gather(2, ids[:, num_prompt:, None]).squeeze(2)


@torch.no_grad()
def rollout(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, int, Tensor, Tensor, Tensor]:
    """Samples, with their log mu, mask and rewards. All prompts have one length: there is no padding on the left."""
    pairs = [(random.randint(10, 99), random.randint(10, 99)) for _ in range(NUM_PROMPTS)]
    prompts = tokenizer([f"{a}+{b}=" for a, b in pairs], return_tensors="pt").input_ids
    ids = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,  # mu has to be the whole distribution
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=MAX_TOKENS,
        num_return_sequences=GROUP_SIZE,
        pad_token_id=tokenizer.eos_token_id,
    )
    completions = ids[:, prompts.shape[1] :]
    is_end = completions == tokenizer.eos_token_id
    mask = is_end.cumsum(1) - is_end.long() == 0  # up to the first end of sequence, which is a sampled token too
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    answers = [str(a + b) for a, b in pairs for _ in range(GROUP_SIZE)]
    rewards = torch.tensor([float(text.strip() == answer) for text, answer in zip(texts, answers, strict=True)])
    return ids, prompts.shape[1], token_logprobs(model, ids, prompts.shape[1]), mask, rewards


def main() -> None:
    """A line for each rollout: the mean reward, and what the objective made of its last update."""
    random.seed(0)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()  # no dropout: it would move pi
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    objective = DRPO(delta=0.2)
    for number in range(1, NUM_ROLLOUTS + 1):
        ids, num_prompt, rollout_logprobs, mask, rewards = rollout(model, tokenizer)
        advantages = group_advantages(rewards, GROUP_SIZE)[:, None].expand_as(mask)
        for _ in range(NUM_UPDATES):
            output = objective(token_logprobs(model, ids, num_prompt), rollout_logprobs, advantages, mask)
            sizes = {"num_tokens": int(mask.sum()), "num_sequences": len(mask)}
            aggregate_loss(output.loss, mask, kind="token_mean", **sizes).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        weight = output.grad_weight[~output.grad_weight.isnan()]
        corrective = (weight < 0).float().mean()
        print(f"rollout {number:2}  reward {rewards.mean():.3f}  w {weight.min():.2f} to {weight.max():.2f}", end="  ")
        print(f"corrective {corrective:.1%}")


if __name__ == "__main__":
    main()
