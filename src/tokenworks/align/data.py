"""Preference data: prompts, and two responses each of which one is preferred.

    load_pairs("pairs.jsonl")          # the user's own, from any file or Hub data set that `core.data` reads
    sentiment_pairs("train")           # those that come with tokenworks

The pairs that come along were written by SmolLM2-135M-Instruct, read as a plain language model, and judged by the
VADER lexicon: of eight continuations of a neutral opening the gladdest was chosen and the saddest rejected.
`write_sentiment_pairs` makes them again.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenworks.core.data import load_records
from tokenworks.core.errors import InputError
from tokenworks.core.files import atomic_write
from tokenworks.core.training import Progress, quiet

FIELDS = ("prompt", "chosen", "rejected")

SPLITS = ("train", "test")

SENTENCE_ENDS = (". ", "! ", "? ", "\n", '."', '!"', '?"')
"""Behind any of these a continuation is cut."""

TEMPLATES = (
    "The new {} is", "My neighbour said that the {} was", "After a week, I think the {}",
    "We looked at the {} and",
    "Everyone who saw the {} said it", "The {} in this town", "To be honest, the {}", "Our review of the {}: it",
    "When they opened the {}, it", "I was told that the {} would be", "The first thing about the {} is that it",
    "They talked about the {} because", "Last night the {} seemed", "In my experience, a {} like this",
    "The story of the {} is", "She wrote about the {} and called it", "Most people find the {}",
    "As for the {}, it", "The old {} has been", "What I remember of the {} is",
)  # fmt: skip

NOUNS = (
    "printer", "garden", "hotel", "film", "teacher", "train", "restaurant", "phone", "museum", "doctor", "song",
    "kitchen", "bridge", "holiday", "school", "coat", "market", "letter", "boat", "game",
)  # fmt: skip


@dataclass(frozen=True)
class SentimentPair:
    """One pair that comes with tokenworks; rewards are VADER's compound scores, in [-1, 1]."""

    prompt: str
    chosen: str
    rejected: str
    chosen_reward: float
    rejected_reward: float


def load_pairs(source: str | Path | Dataset, *, split: str = "train", skip_bad: bool = False) -> Dataset:
    """Pairs as TRL takes them: columns "prompt", "chosen" and "rejected", plain texts or lists of messages.

    Args:
        source: a file or Hub data set as `core.data.load_records` reads, or a `datasets.Dataset`.
        skip_bad: leave out pairs that cannot be used, with a warning, instead of raising.

    Raises:
        InputError: `source` cannot be read; a pair lacks a field, has an empty one, or two equal responses. The
            message names the record.
    """
    rows = list(source) if isinstance(source, Dataset) else load_records(source, split=split, skip_bad=skip_bad)
    good, bad = [], []
    for number, row in enumerate(rows, start=1):
        why = _fault(row)
        if why is None:
            good.append({name: row[name] for name in FIELDS})
        elif skip_bad:
            bad.append(number)
        else:
            raise InputError(f"source: record {number}: {why}. Correct it, or pass skip_bad=True.")
    if bad:
        places = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        warnings.warn(f"left out {len(bad)} of {len(rows)} pairs (records {places})", stacklevel=2)
    if not good:
        raise InputError(f"source: no {'usable ' if bad else ''}pair in it. At least one is needed.")
    return Dataset.from_list(good)


def _fault(row: dict[str, Any]) -> str | None:
    """Why a record is no pair, or None."""
    for name in FIELDS:
        if name not in row:
            return f"no {name!r} in it; its keys are {', '.join(map(str, row)) or 'none'}"
        if not isinstance(row[name], str | list):
            return f"{name!r} is neither a text nor a list of messages"
        if not (row[name].strip() if isinstance(row[name], str) else row[name]):
            return f"{name!r} is empty"
    if row["chosen"] == row["rejected"]:
        return "both responses are the same; they teach nothing"
    return None


def sentiment_pairs(split: str = "train") -> list[SentimentPair]:
    """The pairs that come with tokenworks; openings of one split are not in the other.

    Raises:
        InputError: no such split.
    """
    if split not in SPLITS:
        raise InputError(f"split: there is no {split!r}; choose one of {', '.join(SPLITS)}")
    lines = files("tokenworks.align").joinpath("sentiment.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        SentimentPair(**{k: v for k, v in row.items() if k != "split"}) for row in rows if row["split"] == split
    ]


def openings(split: str = "train") -> list[str]:
    """The neutral openings: 300 to train on and 100 held out, of 20 templates and 20 nouns each."""
    every = [
        ((3 * place + 5 * number) % 4 == 0, template.format(noun))
        for place, template in enumerate(TEMPLATES)
        for number, noun in enumerate(NOUNS)
    ]
    return [text for held, text in every if held == (split == "test")]


def first_sentence(text: str) -> str:
    """A continuation up to the end of its first sentence."""
    ends = [text.find(end) + len(end.rstrip(" ")) for end in SENTENCE_ENDS if end in text]
    return text[: min(ends, default=len(text))].rstrip()


@torch.inference_mode()
def continue_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[str],
    new_tokens: int = 24,
    seed: int = 0,
    batch: int = 40,
) -> list[list[int]]:
    """For each prompt the ids that `model` samples at temperature 1, up to and including the end of text."""
    texts = list(prompts)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found: list[list[int]] = [[] for _ in texts]
    ends = {tokenizer.eos_token_id, *_ends(model)}
    for start in range(0, len(texts), batch):
        rows = order[start : start + batch]
        ids = [list(tokenizer(texts[row])["input_ids"]) for row in rows]
        width = max(map(len, ids))
        padded = torch.tensor([[tokenizer.eos_token_id] * (width - len(row)) + row for row in ids])
        attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        torch.manual_seed(seed * 10_007 + start)
        made = model.generate(  # type: ignore[operator]
            input_ids=padded, attention_mask=attention, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=new_tokens, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        for row, written in zip(rows, made[:, width:].tolist(), strict=True):
            stop = next((place for place, token in enumerate(written) if token in ends), None)
            found[row] = written if stop is None else written[: stop + 1]
    return found


def _ends(model: PreTrainedModel) -> list[int]:
    end = model.generation_config.eos_token_id if model.generation_config is not None else None
    return [] if end is None else end if isinstance(end, list) else [end]


def write_sentiment_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    judge: Callable[[str], float],
    out: Path,
    samples: int = 8,
    gap: float = 0.3,
    progress: Progress = quiet,
) -> int:
    """Make `sentiment.jsonl`: of `samples` continuations of each opening the best and the worst, if their rewards
    are at least `gap` apart. Returns how many pairs there are."""
    rows: list[dict[str, Any]] = []
    for split in SPLITS:
        prompts = openings(split)
        for number in range(samples):
            progress(number, samples, f"{split} openings")
            for prompt, ids in zip(
                prompts, continue_texts(model, tokenizer, prompts, 32, 2 * number + (split == "test")), strict=True
            ):
                text = first_sentence(str(tokenizer.decode(ids, skip_special_tokens=True)))
                rows.append({"split": split, "prompt": prompt, "text": text, "reward": judge(text)})
    kept = 0
    with atomic_write(out) as file:
        for split in SPLITS:
            for prompt in openings(split):
                mine = [r for r in rows if r["prompt"] == prompt and len(r["text"].split()) >= 2]
                best, worst = (choose(mine, key=lambda r: r["reward"]) for choose in (max, min))
                if best["reward"] - worst["reward"] >= gap:
                    pair = SentimentPair(prompt, best["text"], worst["text"], best["reward"], worst["reward"])
                    file.write(json.dumps({"split": split, **asdict(pair)}) + "\n")
                    kept += 1
    return kept
