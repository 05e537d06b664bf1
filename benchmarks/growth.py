"""How the time and memory of an update grow with tokens, longest completion, sequences, group size and vocabulary.

    python benchmarks/growth.py
    python benchmarks/growth.py --device cuda --precision bf16-mixed --hidden 2048 --layers 24 --tokens 32768
    python benchmarks/growth.py --plot growth.png

One quantity is doubled at a time and the others stay: completions of random lengths behind prompts of one length, split
into micro-batches as a training splits them, through a Llama of random weights forward and backward, and AdamW's step.
`longest` makes one completion longer and the others shorter, `sequences` cuts the same tokens into more completions,
`group_size` samples more completions of each prompt. Packed, an update costs its tokens; padded, what the longest
completion of each micro-batch makes of them. Every point is a process of its own, whose peak is that of its resident
memory above what it had before the model, or on a GPU that of the allocator.

Both ways compute the same: the script stops if the loss or the norm of the gradient of the first update differs by more
than `TOLERANCE`.
"""

import argparse
import math
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drpo_lightning.batch import Completion, Rollout, RolloutBatch
from drpo_lightning.datamodules.micro_batches import Split
from drpo_lightning.modules import PolicyNetwork

GIB = 2**30
QUANTITIES = ("tokens", "longest", "sequences", "group_size", "vocabulary")
TOLERANCE = {"32-true": 1e-5, "bf16-mixed": 1e-3}
"""By which packed and padded may differ, as a part of the gradient's norm: 4e-7 and 2e-5 were seen on a CPU."""


@dataclass(frozen=True)
class Work:
    """What an update computes.

    Args:
        prompts: of the update.
        group_size: completions of each.
        prompt_tokens: of each prompt.
        tokens: of all completions together.
        longest: tokens of the longest completion; 0 is what the lengths drawn have.
        vocabulary: rows of the embedding and of the head, which are tied.
    """

    prompts: int
    group_size: int
    prompt_tokens: int
    tokens: int
    longest: int = 0
    vocabulary: int = 4096

    def grown(self, quantity: str, factor: int) -> "Work":
        """The same work with one quantity `factor` times as large."""
        if quantity == "tokens":
            return replace(self, tokens=self.tokens * factor)
        if quantity == "longest":
            return replace(self, longest=2 * self.tokens // (self.prompts * self.group_size) * factor)
        if quantity == "sequences":
            return replace(self, prompts=self.prompts * factor)
        if quantity == "group_size":
            return replace(self, group_size=self.group_size * factor, tokens=self.tokens * factor)
        return replace(self, vocabulary=self.vocabulary * factor)

    def completion_lengths(self) -> list[int]:
        """Tokens of each completion: exponentially distributed, 1 at least."""
        number = self.prompts * self.group_size
        shares = -((torch.arange(number) + 0.5) / number).log()  # the quantiles of the distribution
        shares = shares[torch.randperm(number, generator=torch.Generator().manual_seed(0))]
        if not self.longest:
            return [max(1, round(float(share))) for share in shares / shares.sum() * self.tokens]
        rest = shares[1:] / shares[1:].sum() * (self.tokens - self.longest)
        return [self.longest, *(min(self.longest, max(1, round(float(share)))) for share in rest)]

    def rollout(self) -> Rollout:
        """Random samples of that size."""
        generator = torch.Generator().manual_seed(0)

        def tokens(number: int) -> list[int]:
            return torch.randint(self.vocabulary, (number,), generator=generator).tolist()

        lengths = self.completion_lengths()
        return Rollout(
            prompts=[""] * len(lengths),
            prompt_ids=[tokens(self.prompt_tokens) for _ in lengths],
            completions=[Completion(tokens(length), [-1.0] * length, "stop") for length in lengths],
            texts=[""] * len(lengths),
            columns={},
            group_size=self.group_size,
            rewards=torch.randn(len(lengths), generator=generator),
        )


@dataclass(frozen=True)
class Cost:
    """What an update took.

    Args:
        tokens: of its sequences.
        places: tokens with padding, those that are computed if it is not packed.
        seconds: median of a few updates.
        peak: bytes.
        loss: of the first update.
        gradient_norm: likewise.
    """

    tokens: int
    places: int
    seconds: float
    peak: int
    loss: float
    gradient_norm: float


def micro_batches(work: Work, window: int, *, is_packed: bool) -> tuple[list[RolloutBatch], int]:
    """The update's micro-batches, and the tokens that they have with their padding."""
    rollout, split = work.rollout(), Split(0, work.group_size, 1, window, is_packed)
    batches = split.micro_batch_rows(range(work.prompts), rollout.lengths)
    sizes = {"num_update_tokens": rollout.num_completion_tokens, "num_update_sequences": len(rollout)}
    collated = [RolloutBatch.collate(rollout, rows, rollout.rewards, pad_token_id=0, **sizes) for rows in batches]
    return collated, sum(batch.input_ids.numel() for batch in collated)


def cost(work: Work, settings: argparse.Namespace, *, is_packed: bool) -> Cost:
    """Updates a model a few times, in this process."""
    device = torch.device(settings.device)
    before = peak(device)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=work.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=4 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden // 64,
        num_key_value_heads=settings.hidden // 64,
        tie_word_embeddings=True,
    )
    network = PolicyNetwork(LlamaForCausalLM(config), is_head_linear=True, is_packed=is_packed).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6)
    batches, places = micro_batches(work, settings.micro_batches, is_packed=is_packed)
    seconds = []
    loss, gradient_norm = math.nan, math.nan
    for number in range(1 + settings.repeats):
        start = time.perf_counter()
        losses = [backward(network, batch, settings.precision) for batch in batches]
        if number == 0:
            loss = float(sum(losses))
            gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
            gradient_norm = float(torch.nn.utils.get_total_norm(gradients))
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    return Cost(tokens, places, statistics.median(seconds[1:]), peak(device) - before, loss, gradient_norm)


def backward(network: PolicyNetwork, batch: RolloutBatch, precision: str) -> torch.Tensor:
    """Adds a micro-batch's part of the gradient; gives its part of the loss."""
    device = next(network.parameters()).device
    inputs = (batch.input_ids, batch.attention_mask, batch.completion_mask)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        logprobs = network(*(tensor.to(device) for tensor in inputs))
    loss: torch.Tensor = -(logprobs * batch.advantages.to(device)).sum() / batch.num_update_tokens
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def check_equal(packed: Cost, padded: Cost, tolerance: float) -> None:
    """Raises `ValueError` if packed and padded have not computed the same, see `TOLERANCE`."""
    for name in ("loss", "gradient_norm"):
        one, other = getattr(packed, name), getattr(padded, name)
        if not math.isclose(one, other, rel_tol=0, abs_tol=tolerance * padded.gradient_norm):
            raise ValueError(
                f"the {name} is {one} packed and {other} padded, with a gradient of {padded.gradient_norm}"
            )


def peak(device: torch.device) -> int:
    """Highest memory so far in bytes, of the GPU's allocator or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def cost_in_a_process_of_its_own(work: Work, settings: argparse.Namespace, *, is_packed: bool) -> Cost:
    """See `cost`; this process keeps no memory of it, and no GPU."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(cost, work, settings, is_packed=is_packed).result()


def plot(costs: dict[str, list[tuple[int, Cost, Cost]]], path: str) -> None:
    """Draws time and memory against each quantity."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(costs), figsize=(4 * len(costs), 6), squeeze=False)
    for column, (quantity, points) in enumerate(costs.items()):
        factors = [factor for factor, *_ in points]
        for row, (name, unit) in enumerate((("seconds", 1), ("peak", GIB))):
            for number, label in ((1, "packed"), (2, "padded")):
                axes[row][column].plot(factors, [getattr(p[number], name) / unit for p in points], "o-", label=label)
            axes[row][column].set(xlabel=f"{quantity}, times", ylabel="seconds" if row == 0 else "GiB")
            axes[row][column].set_ylim(bottom=0)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantities", nargs="+", choices=QUANTITIES, default=QUANTITIES)
    parser.add_argument("--points", type=int, default=4, help="sizes of each quantity, each twice the one before")
    parser.add_argument("--repeats", type=int, default=3, help="updates that are timed, after one that is not")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048, help="of all completions")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--plot", metavar="PNG", help="draws the table, which takes matplotlib")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for each point."""
    settings = parse(arguments)
    base = Work(settings.prompts, settings.group_size, settings.prompt_tokens, settings.tokens)
    print(f"torch {torch.__version__}, {settings.device}, {settings.precision}, {torch.get_num_threads()} threads")
    print("| quantity | times | tokens | with padding | packed s | padded s | ratio | packed GiB | padded GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    costs: dict[str, list[tuple[int, Cost, Cost]]] = {}
    for quantity in settings.quantities:
        costs[quantity] = []
        for factor in (2**i for i in range(settings.points)):
            work = base.grown(quantity, factor)
            packed, padded = (
                cost_in_a_process_of_its_own(work, settings, is_packed=is_packed) for is_packed in (True, False)
            )
            check_equal(packed, padded, TOLERANCE[settings.precision])
            costs[quantity].append((factor, packed, padded))
            print(
                f"| {quantity} | {factor} | {packed.tokens} | {padded.places} | {packed.seconds:.3f} | "
                f"{padded.seconds:.3f} | {padded.seconds / packed.seconds:.2f} | {packed.peak / GIB:.2f} | "
                f"{padded.peak / GIB:.2f} |",
                flush=True,
            )
    if settings.plot:
        plot(costs, settings.plot)


if __name__ == "__main__":
    main()
