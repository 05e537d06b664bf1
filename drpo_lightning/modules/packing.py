"""Samples of a padded batch one after the other in a single sequence, without the padding."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F


class LengthGroups(NamedTuple):
    """Samples of a packed sequence sorted into padded batches of similar lengths.

    Attributes:
        places: of each group the place in the sequence of every token, `[rows, seq]`; the padding on the right of a row
            takes the place of its first token.
        restore: where each token of the sequence stands in the groups, flattened and one after the other.
    """

    places: list[Int[Tensor, "rows seq"]]
    restore: Int[Tensor, " tokens"]


class PackedSequences:
    """Where the samples of a packed sequence begin and end.

    Args:
        lengths: tokens of each sample, at least 1.
        device: of the sequence.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = list(lengths)
        self.max_length = max(lengths)
        self.cumulative_lengths = F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0)).int().to(device)
        """Where each sample begins, and where the last one ends: `[samples + 1]`, int32."""
        self.has_flash_kernel = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        """True on a GPU that torch's kernel for variable lengths runs on, in half precision."""

    @cached_property
    def groups(self) -> LengthGroups:
        """The samples by length: what padding a group has is a fifth of its longest sample, or a few tokens."""
        device = self.cumulative_lengths.device
        starts = self.cumulative_lengths[:-1].long().tolist()
        places, masks = [], []
        for samples in similar(self.lengths):
            first = torch.tensor([starts[sample] for sample in samples], device=device)[:, None]
            columns = torch.arange(self.lengths[samples[0]], device=device)
            is_token = columns < torch.tensor([self.lengths[sample] for sample in samples], device=device)[:, None]
            places.append(first + columns * is_token)
            masks.append(is_token.flatten())
        of_tokens = torch.cat(masks).nonzero().squeeze(1)
        restore = torch.empty_like(of_tokens)
        restore[torch.cat([group.flatten() for group in places])[of_tokens]] = of_tokens
        return LengthGroups(places, restore)


def similar(lengths: Sequence[int], *, ratio: float = 0.8, slack: int = 16) -> list[list[int]]:
    """Numbers of the samples in groups, the longest of a group first.

    Args:
        lengths: of each sample.
        ratio: a sample joins a longer one if it has at least this share of its length,
        slack: or if it is at most this many tokens shorter.
    """
    groups: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        if groups:
            longest = lengths[groups[-1][0]]
            if lengths[sample] >= min(ratio * longest, longest - slack):
                groups[-1].append(sample)
                continue
        groups.append([sample])
    return groups


def packed_inputs(input_ids: Int[Tensor, "batch seq"], attention_mask: Bool[Tensor, "batch seq"]) -> dict[str, Any]:
    """What a language model with `packed_attention` is called with, to see the tokens of a batch without its padding.

    Its hidden states are `[1, tokens, hidden]`, in the order of `attention_mask.nonzero()`.

    Args:
        input_ids: token ids.
        attention_mask: False on padding; True somewhere.
    """
    lengths = [length for length in attention_mask.sum(1).tolist() if length]
    sequences = PackedSequences(lengths, input_ids.device)
    positions = attention_mask.cumsum(1) - 1
    return {
        "input_ids": input_ids[attention_mask][None],
        "position_ids": positions[attention_mask][None],
        # Of four dimensions, and so passed on as it is: a mask made of two, or of none, would have tokens^2 entries.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
        "packed_sequences": sequences,
        # The names of transformers, for layers that are not attention and look for them.
        "cu_seq_lens_q": sequences.cumulative_lengths,
        "cu_seq_lens_k": sequences.cumulative_lengths,
        "max_length_q": sequences.max_length,
        "max_length_k": sequences.max_length,
        "use_cache": False,
    }
