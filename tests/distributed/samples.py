"""A rollout that is the same wherever it is trained on: samples with their logprobs and advantages, by update."""

from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM

TEMPERATURE = 0.6
NUM_UPDATES = 3
SAMPLES_PER_UPDATE = 16
MAX_TOKENS = 20
FIRST_DIGIT, NUM_DIGITS, PLUS, EQUALS = 19, 10, 14, 32


class Sample(NamedTuple):
    """One scored completion.

    Attributes:
        prompt_ids: token ids of the prompt.
        token_ids: sampled tokens.
        logprobs: log mu of each, in nats.
        advantage: A, in units of reward.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    advantage: float


@torch.no_grad()
def make_updates(model_folder, seed=0):
    """The samples of each update; the first half of an update has far more tokens than the second.

    log mu is scattered about the log pi of the model as it comes: tokens stay, shift a little, shift beyond 0.2 in
    either direction, and a few are beyond the clamp of the log-ratio, with pi next to nothing and mu near 1.
    """
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    def uniform():
        return float(torch.rand((), generator=generator))

    def sample(length):
        digits = [FIRST_DIGIT + number(0, NUM_DIGITS) for _ in range(4)]
        sequence = prompt = [*digits[: number(1, 4)], PLUS, digits[3], EQUALS]
        logprobs = []
        for _ in range(length):
            logits = model(torch.tensor([sequence])).logits[0, -1]
            log_pi = (logits / TEMPERATURE).log_softmax(-1)
            if kind := uniform() < 0.05:
                token = int(log_pi.argmin())
            else:
                token = int(torch.multinomial((logits / 2).softmax(-1), 1, generator=generator))
            spread = 0.0 if uniform() < 0.2 else 0.8 * float(torch.randn((), generator=generator))
            log_mu = -0.1 if kind else min(float(log_pi[token]) + spread, -0.01 * uniform())
            sequence = [*sequence, token]
            logprobs.append(log_mu)
        return Sample(prompt, sequence[len(prompt) :], logprobs, number(-4, 5) / 4)

    def update():
        half = SAMPLES_PER_UPDATE // 2
        long = [MAX_TOKENS, *(number(8, MAX_TOKENS) for _ in range(half - 1))]
        short = [1, *(number(1, 8) for _ in range(half - 1))]
        return [sample(length) for length in (*long, *short)]

    return [update() for _ in range(NUM_UPDATES)]
