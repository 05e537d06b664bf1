"""Makes the policy of the quickstart: a small Llama that adds numbers only partly well.

The model is a Llama with a character-level tokenizer, trained from scratch on lines like `37+58=95`. Training stops
as soon as the sampled accuracy on held-out problems reaches `--target`, so that reinforcement learning has something
to improve. Everything follows from `--seed`; two minutes on two cores.

    python scripts/pretrain_arithmetic.py --out models/arithmetic
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from drpo_lightning.datamodules.arithmetic import ArithmeticPrompts

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
CHARACTERS = "".join(chr(code) for code in range(32, 127))
CONTEXT_LENGTH = 512


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per printable ASCII character."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def small_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with 2 layers of width 128 and tied embeddings: 0.4 M parameters, 1.7 MB in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `[rows, length]`, padded on the right, and labels: -100 on the prompt and the padding."""
    lines = [tokenizer(row["prompt"] + row["answer"]).input_ids + [tokenizer.eos_token_id] for row in rows]
    length = max(map(len, lines))
    ids = torch.tensor([line + [tokenizer.pad_token_id] * (length - len(line)) for line in lines])
    labels = ids.clone()
    for label, row, line in zip(labels, rows, lines, strict=True):
        label[: len(row["prompt"])] = -100
        label[len(line) :] = -100
    return ids, labels


@torch.no_grad()
def sampled_accuracy(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> float:
    """The exact chance that a sample at temperature 1 is the right answer, averaged over the problems."""
    logits = model(input_ids=ids).logits[:, :-1]
    logprobs = -F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=-100)
    return logprobs.view(len(ids), -1).sum(1).exp().mean().item()


def main() -> None:
    """Trains until the target accuracy is reached and writes model and tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/arithmetic"))
    parser.add_argument("--target", type=float, default=0.3, help="stop at this sampled accuracy")
    parser.add_argument("--max_steps", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = character_tokenizer()
    model = small_llama(tokenizer)
    train = encode(tokenizer, ArithmeticPrompts(split="train").load())
    held_out = encode(tokenizer, ArithmeticPrompts(split="validation").load())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    for step in range(args.max_steps + 1):
        if step % 25 == 0:
            accuracy = sampled_accuracy(model, *held_out)
            print(f"step {step}: sampled accuracy {accuracy:.3f}", flush=True)
            if accuracy >= args.target:
                break
        rows = torch.randint(len(train[0]), (512,))
        loss = model(input_ids=train[0][rows], labels=train[1][rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
