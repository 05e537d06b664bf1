"""What the tests of rollouts have in common."""

from collections import Counter

import torch

from drpo_lightning.datamodules import PromptSource
from drpo_lightning.rollout import TransformersEngine


class Listed(PromptSource):
    def __init__(self, *prompts, **columns):
        self.rows = [{"prompt": prompt} | columns for prompt in prompts]

    def load(self):
        return self.rows


class WatchedEngine(TransformersEngine):
    """The real engine, which also notes what it is asked for."""

    can_sleep = True

    def __init__(self):
        super().__init__()
        self.calls = []
        self.requests = []

    def start(self, *arguments, **settings):
        self.calls.append("start")
        super().start(*arguments, **settings)

    def load_weights(self, weights):
        self.calls.append("load")
        super().load_weights(weights)

    def generate(self, prompt_ids, sampling, **settings):
        self.calls.append("generate")
        self.requests.append({"num_prompts": len(prompt_ids), "sampling": sampling} | settings)
        return super().generate(prompt_ids, sampling, **settings)

    def _sleep(self):
        self.calls.append("sleep")

    def _wake(self):
        self.calls.append("wake")


def trained_sequences(batches):
    """Each row that was trained on: its tokens, the number of prompt tokens, and the logprobs of the engine."""
    rows = []
    for batch in batches:
        for i in range(len(batch.input_ids)):
            inside, sampled = batch.attention_mask[i], batch.completion_mask[i]
            logprobs = tuple(batch.rollout_logprobs[i][sampled].tolist())
            rows.append((tuple(batch.input_ids[i][inside].tolist()), int((inside & ~sampled).sum()), logprobs))
    return Counter(rows)


def trained_tokens(batches):
    """The token ids of each row that was trained on."""
    return Counter(tokens for tokens, _, _ in trained_sequences(batches).elements())


def sampled_sequences(rollout):
    return Counter(
        (tuple(ids + c.token_ids), len(ids), tuple(torch.tensor(c.logprobs).tolist()))
        for ids, c in zip(rollout.prompt_ids, rollout.completions, strict=True)
    )


def weights_of(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.module.parameters()])
