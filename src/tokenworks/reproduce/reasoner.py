"""A small model that reasons and errs: chains of sums, letter by letter, where a rollout costs next to nothing.

    37+58-21+46:37+58=95;95-21=74;74+46=120;#120

Nobody plants its errors: training stops while it still makes some. A question has two digits a number and never
goes below zero; those of a held-out split are in no other.

    reasoner = load_reasoner(seed=0)
    question = questions("test", 1, seed=0)[0]
    is_right(question.prompt)("37+58=95;95-21=74;74+46=120;#120")
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from tokenworks.core.corpus import train_bpe
from tokenworks.core.files import atomic_write, cache_folder
from tokenworks.core.training import Progress, fit, quiet

LAYERS, WIDTH = 3, 128
STEPS, ROWS, LEARNING_RATE = 1200, 64, 3e-3
"""So many steps leave it right in six of seven samples at temperature 1."""

LONGEST = 40
"""Tokens of an answer, its end included; no right one is longer."""

SPLITS = {"train": (0.0, 0.8), "lessons": (0.8, 0.9), "test": (0.9, 1.0)}
"""What the reasoner learns from, what preferences are made of, and what is held out: shares of all questions."""


@dataclass(frozen=True)
class Question:
    """`prompt` is "37+58-21+46:", `chain` the right answer to it."""

    prompt: str
    chain: str


@dataclass(frozen=True)
class Reasoner:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def questions(split: str, count: int, seed: int = 0) -> list[Question]:
    """Questions drawn with `seed`; equal ones belong to one split, whatever the seed."""
    chance = random.Random(f"{split}/{seed}")
    found: list[Question] = []
    while len(found) < count:
        a, b, d = (chance.randrange(10, 100) for _ in range(3))
        c = chance.randrange(10, min(99, a + b) + 1)
        place = random.Random(f"{a},{b},{c},{d}").random()
        low, high = SPLITS[split]
        if low <= place < high:
            found.append(_question((a, b, c, d)))
    return found


def _question(numbers: Sequence[int]) -> Question:
    a, b, c, d = numbers
    sums = (a, a + b, a + b - c, a + b - c + d)
    steps = [
        f"{before}{sign}{number}={after};"
        for (before, after), sign, number in zip(pairwise(sums), "+-+", (b, c, d), strict=True)
    ]
    return Question(f"{a}+{b}-{c}+{d}:", f"{''.join(steps)}#{sums[-1]}")


def answer(text: str) -> str:
    """What stands behind the mark of the result; empty if nothing does."""
    return text.partition("#")[2].strip()


def is_right(prompt: str) -> Callable[[str], bool]:
    """The checker of a question: whether an answer comes to its result, however it got there."""
    a, b, c, d = (int(part) for part in prompt.rstrip(":").replace("-", "+").split("+"))
    return lambda text: answer(text) == str(a + b - c + d)


def first_wrong(text: str, chain: str) -> int | None:
    """The first place where an answer leaves the right chain, None if it does not."""
    for place, letter in enumerate(text):
        if place >= len(chain) or letter != chain[place]:
            return place
    return None


def reasoner_tokenizer() -> PreTrainedTokenizerBase:
    """A token a letter, and the end."""
    tokenizer = train_bpe(["nothing to merge"], 257, special=["<end>"])
    tokenizer.eos_token = "<end>"
    return tokenizer


def load_reasoner(seed: int = 0, steps: int = STEPS, progress: Progress = quiet) -> Reasoner:
    """The model of a seed: from the user's cache folder, or trained in some minutes and kept there."""
    tokenizer = reasoner_tokenizer()
    name = f"{LAYERS}x{WIDTH}-{steps}x{ROWS}-{seed}"
    path = cache_folder() / "reasoner" / f"{name}.safetensors"
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    if path.exists():
        model.load_state_dict(load_file(path), strict=False)  # the head is the embeddings
        return Reasoner(model.eval(), tokenizer)

    def loss(step: int) -> Tensor:
        chosen = questions("train", ROWS, 1_000_000 * seed + step)
        ids, labels = rows([(q.prompt, q.chain) for q in chosen], tokenizer)
        found: Tensor = model(input_ids=ids, labels=labels).loss
        return found

    fit(model.train(), loss, steps, LEARNING_RATE, path.with_suffix(".pt"), progress=progress)
    kept = {n: p.detach().contiguous() for n, p in model.named_parameters()}
    with atomic_write(path, "wb") as out:
        out.write(save(kept, metadata={"settings": json.dumps(name)}))
    return Reasoner(model.eval(), tokenizer)


def rows(texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Ids and labels [n, T] of prompts and answers; of a question nothing is to be learned, it is random."""
    split = [
        (list(tokenizer(p)["input_ids"]), [*tokenizer(a)["input_ids"], tokenizer.eos_token_id]) for p, a in texts
    ]
    width = max(len(p) + len(a) for p, a in split)
    ids = torch.full((len(split), width), int(tokenizer.eos_token_id))
    labels = torch.full_like(ids, -100)
    for row, (prompt, own) in enumerate(split):
        ids[row, : len(prompt) + len(own)] = torch.tensor(prompt + own)
        labels[row, len(prompt) : len(prompt) + len(own)] = torch.tensor(own)
    return ids, labels
