"""Numbers that break at a chosen place of a run, and what of a run must not change."""

import math

import torch
from lightning.pytorch import Callback

from drpo_lightning.modules.sharding import local
from drpo_lightning.objectives import DRPO, Objective


class Plant(Callback):
    """Breaks one number of one sample in some updates, counted from 1, on one rank.

    It is that of the first token of the sample in row `row` of the micro-batch, or one entry of the gradient.
    """

    def __init__(self, quantity, *, updates, row, value=math.nan, rank=0, is_outside=False):
        self.quantity = quantity
        self.updates = updates
        self.row = row
        self.value = value
        self.rank = rank
        self.is_outside = is_outside
        self.place = None
        """Where the number of the current micro-batch breaks; None where it does not."""
        self.samples = {}
        """Sample that was broken, by update."""

    def on_train_start(self, trainer, pl_module):
        pl_module.network.register_forward_hook(self.break_policy_logprobs)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        update = trainer.global_step + 1
        self.place = None
        if update not in self.updates or trainer.global_rank != self.rank:
            return
        mask = ~batch.completion_mask if self.is_outside else batch.completion_mask
        self.place = (self.row, int(mask[self.row].nonzero()[0]))
        self.samples[update] = int(batch.sample_ids[self.row])
        if self.quantity in ("rollout_logprobs", "advantages"):
            getattr(batch, self.quantity)[self.place] = self.value

    def break_policy_logprobs(self, network, arguments, logprobs):
        if self.quantity != "policy_logprobs" or self.place is None or not logprobs.requires_grad:
            return logprobs
        return logprobs.masked_fill(self.where(logprobs), self.value)

    def where(self, values):
        """True at the place."""
        mask = torch.zeros_like(values, dtype=torch.bool)
        mask[self.place] = True
        return mask

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.quantity == "gradient" and self.place is not None:
            gradient = next(p.grad for p in pl_module.parameters() if p.grad is not None and local(p.grad).numel())
            local(gradient).view(-1)[0] = self.value


class Breaks(Objective):
    """DRPO whose loss breaks where a plant says so, without a trace in the gradient.

    With `ignores_nan` it is a constant there, and so hides that log pi is NaN.
    """

    def __init__(self, plant, *, ignores_nan=False):
        self.plant = plant
        self.ignores_nan = ignores_nan

    def terms(self, tokens):
        if self.plant.place is None:
            return DRPO().terms(tokens)
        where = self.plant.where(tokens.policy_logprobs)
        sound = tokens._replace(
            policy_logprobs=tokens.policy_logprobs.masked_fill(where, -1.0),
            rollout_logprobs=tokens.rollout_logprobs.masked_fill(where, -1.0),
        )
        terms = DRPO().terms(sound)
        value = 0.0 if self.ignores_nan else math.nan
        return terms._replace(objective=terms.objective.masked_fill(where, value))

    def describe(self):
        return "DRPO that breaks"


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


class SparingAdamW(torch.optim.AdamW):
    """AdamW that leaves some of its steps out, counted from 1."""

    def __init__(self, parameters, updates):
        super().__init__(parameters, lr=1e-3)
        self.updates = updates
        self.num_steps = 0

    def step(self, closure=None):
        self.num_steps += 1
        return closure() if self.num_steps in self.updates else super().step(closure)


class Recorder(Callback):
    """Keeps this rank's weights and what the optimizer remembers, by the number of updates completed."""

    def __init__(self):
        self.states = {}

    def now(self, trainer, pl_module):
        weights = {name: local(parameter).detach().clone() for name, parameter in pl_module.named_parameters()}
        numbers = [local(value).clone() for state in trainer.optimizers[0].state.values() for value in state.values()]
        return [*weights.values(), *numbers]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step not in self.states:
            self.states[trainer.global_step] = self.now(trainer, pl_module)


def same_tensors(ours, theirs):
    """True if all are equal, bit for bit."""
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
