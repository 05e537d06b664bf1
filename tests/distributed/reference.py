"""The same trainings in float64, one sample at a time, written from the formulas: what every case is compared with."""

from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from drpo_lightning.objectives import DPPO
from tests.distributed.cases import DELTA, HORIZON, THRESHOLD
from tests.distributed.samples import SAMPLES_PER_UPDATE, TEMPERATURE

LOG_RATIO_CLAMP = 20.0


class Reference(NamedTuple):
    """What a training must come to.

    Attributes:
        scalars: of each update, by log key.
        tokens: per-token values of each update, by the tag of their histogram.
        num_tokens: completion tokens of each update.
        weights: after the last update, by name.
    """

    scalars: list[dict[str, float]]
    tokens: list[dict[str, np.ndarray]]
    num_tokens: list[int]
    weights: dict[str, torch.Tensor]


def is_masked(problem, row):
    """True if a sample of an update has no completion tokens."""
    return 4 * row // SAMPLES_PER_UPDATE in problem.masked


def train(model_folder, problem, updates):
    """Trains by hand, with the plain formula of SGD."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64).eval()
    scalars, tokens, counts = [], [], []
    for samples in updates:
        chosen = [sample for row, sample in enumerate(samples) if not is_masked(problem, row)]
        num_tokens = sum(len(sample.token_ids) for sample in chosen)
        loss, rows = torch.zeros((), dtype=torch.float64), []
        for sample in chosen:
            log_pi = token_logprobs(model, sample)
            log_mu = torch.tensor(sample.logprobs, dtype=torch.float32).double()
            objective, keep, weight = objective_of(problem, log_pi, log_mu, sample.advantage)
            loss = loss - objective.sum()
            advantage = torch.full_like(log_mu, sample.advantage)
            rows.append(torch.stack([log_pi.detach(), log_mu, advantage, keep.double(), weight]))
        denominator = num_tokens if problem.aggregation == "token_mean" else HORIZON * len(samples)
        loss = loss / denominator
        model.zero_grad()
        loss.backward()
        parameters = list(model.parameters())
        norm = torch.cat([parameter.grad.flatten() for parameter in parameters]).norm()
        factor = 1.0 if problem.clip is None else min(1.0, problem.clip / (float(norm) + 1e-6))
        with torch.no_grad():
            for parameter in parameters:
                parameter -= problem.learning_rate * factor * parameter.grad
        found, values = statistics(*torch.cat(rows, 1).numpy())
        if not isinstance(problem.objective, DPPO):
            found = {name: value for name, value in found.items() if not name.startswith("mask/")}
        scalars.append(found | {"optim/loss": loss.item(), "optim/grad_norm": float(norm)})
        tokens.append(values)
        counts.append(num_tokens)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return Reference(scalars, tokens, counts, weights)


def token_logprobs(model, sample):
    """Log pi of a sample's tokens."""
    logits = model(torch.tensor([sample.prompt_ids + sample.token_ids])).logits[0, len(sample.prompt_ids) - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]


def objective_of(problem, log_pi, log_mu, advantage):
    """Per token: what is maximised, whether the mask keeps it, and the gradient weight."""
    log_ratio = (log_pi - log_mu).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    ratio = log_ratio.exp()
    shift = (log_mu.exp() * (ratio - 1)).detach()
    sign = torch.tensor(advantage).sign()
    if isinstance(problem.objective, DPPO):
        keep = ~((shift.abs() > THRESHOLD) & (advantage * shift > 0))
        objective, weight = keep * ratio * advantage, keep.double()
    else:
        keep = torch.ones_like(shift, dtype=torch.bool)
        objective = ratio * advantage - abs(advantage) * log_mu.exp() * (ratio - 1) ** 2 / (2 * DELTA)
        weight = 1 - sign * shift / DELTA
    weight = weight.where((log_pi - log_mu).detach().abs() <= LOG_RATIO_CLAMP, 0.0)
    return objective, keep, weight if advantage else torch.full_like(weight, torch.nan)


def statistics(log_pi, log_mu, advantages, keep, weight):
    """What callbacks log of an update, by key, and the values behind the histograms, by tag."""
    log_ratio = log_pi - log_mu
    clamped = log_ratio.clip(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    ratio, mu = np.exp(clamped), np.exp(log_mu)
    shift = mu * np.expm1(clamped)
    k3 = np.expm1(clamped) - clamped
    signed = advantages != 0
    found = {
        "policy_shift/abs_mean": abs(shift).mean(),
        "policy_shift/mean": shift.mean(),
        "policy_shift/abs_max": abs(shift).max(),
        "policy_shift/beyond_0.2_fraction": (abs(shift) > 0.2).mean(),
        "log_ratio/abs_mean": abs(log_ratio).mean(),
        "log_ratio/abs_max": abs(log_ratio).max(),
        "log_ratio/beyond_clamp_fraction": (abs(log_ratio) > LOG_RATIO_CLAMP).mean(),
        "importance_ratio/mean": ratio.mean(),
        "importance_ratio/max": ratio.max(),
        "entropy/rollout": -log_mu.mean(),
        "divergence/k1_kl": -log_ratio.mean(),
        "divergence/k3_kl": k3.mean(),
        "divergence/k3_kl_max": k3.max(),
        "divergence/binary_tv": abs(shift).mean(),
        "mask/fraction": 1 - keep.mean(),
        "mask/fraction_positive_adv": 1 - keep[advantages > 0].mean(),
        "mask/fraction_negative_adv": 1 - keep[advantages < 0].mean(),
        "grad_weight/mean": weight[signed].mean(),
        "grad_weight/max": weight[signed].max(),
        "grad_weight/min": weight[signed].min(),
        "grad_weight/corrective_fraction": (weight[signed] < 0).mean(),
        "region/outside_fraction": ((abs(shift) > 0.2) & (shift * advantages > 0)).mean(),
    }
    values = {
        "histogram/probability_shift": shift,
        "histogram/log_ratio": log_ratio,
        "histogram/grad_weight": weight[signed],
    }
    return {name: float(value) for name, value in found.items()}, values
