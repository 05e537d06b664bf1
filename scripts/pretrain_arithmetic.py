"""Makes the policy of the quickstart: a small Llama that adds numbers only partly well.

The model is a Llama with a character-level tokenizer, trained from scratch on lines like `37+58=95`: first on right
ones, until it can add, then on a careless corpus, in which a random digit of most sums is wrong. So it knows the answer
and gives another most of the time, as a base model does, and reinforcement learning has something to sharpen.
Everything follows from `--seed`; some six minutes on two cores.

    python scripts/pretrain_arithmetic.py --out models/arithmetic
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
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
    lines = [[*tokenizer(row["prompt"] + row["answer"]).input_ids, tokenizer.eos_token_id] for row in rows]
    length = max(map(len, lines))
    ids = torch.tensor([line + [tokenizer.pad_token_id] * (length - len(line)) for line in lines])
    labels = ids.clone()
    for label, row, line in zip(labels, rows, lines, strict=True):
        label[: len(row["prompt"])] = -100
        label[len(line) :] = -100
    return ids, labels


def with_wrong_digits(
    ids: torch.Tensor, labels: torch.Tensor, tokenizer: PreTrainedTokenizerFast, fraction: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces one digit of the sum by a random one, in a random `fraction` of the lines."""
    is_digit = (labels >= 0) & (labels != tokenizer.eos_token_id)
    position = (is_digit * torch.rand(labels.shape)).argmax(1)
    rows = (torch.rand(len(ids)) < fraction).nonzero()[:, 0]
    digits = torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")))
    wrong = digits[torch.randint(10, (len(rows),))]
    ids, labels = ids.clone(), labels.clone()
    ids[rows, position[rows]] = wrong
    labels[rows, position[rows]] = wrong
    return ids, labels


@torch.no_grad()
def sampled_accuracy(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> float:
    """The exact chance that a sample at temperature 1 is the right answer, averaged over the problems."""
    logits = model(input_ids=ids).logits[:, :-1]
    logprobs = -cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=-100)
    return logprobs.view(len(ids), -1).sum(1).exp().mean().item()


def main() -> None:
    """Trains until the target accuracy is reached and writes model and tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/arithmetic"))
    parser.add_argument("--right_steps", type=int, default=2000, help="steps on lines with right sums")
    parser.add_argument("--careless_steps", type=int, default=200, help="steps on lines with wrong digits after that")
    parser.add_argument("--wrong", type=float, default=0.6, help="share of careless lines with a wrong digit")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = character_tokenizer()
    model = small_llama(tokenizer)
    train = encode(tokenizer, ArithmeticPrompts(split="train").load())
    held_out = encode(tokenizer, ArithmeticPrompts(split="validation").load())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    for step in range(args.right_steps + args.careless_steps):
        if step % 100 == 0:
            print(f"step {step}: sampled accuracy {sampled_accuracy(model, *held_out):.3f}", flush=True)
        rows = torch.randint(len(train[0]), (512,))
        wrong = 0.0 if step < args.right_steps else args.wrong
        ids, labels = with_wrong_digits(train[0][rows], train[1][rows], tokenizer, wrong)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"sampled accuracy of the finished model: {sampled_accuracy(model, *held_out):.3f}")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
