"""cDPO's contrastive scores on SmolLM2, for ten wrong answers of its own whose critical token was marked by hand.

A demonstration on a real model, not a test of the claim: SmolLM2 answers one question in six rightly.
The models of right and of wrong answers are its last six layers, tuned on what it wrote to other questions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tokenworks.align.rollouts import sample_continuations
from tokenworks.align.scores import contrastive_scores, token_log_probs
from tokenworks.align.vocabulary import Head, vocabulary_terms
from tokenworks.core.sampling import Sampling
from tokenworks.core.trace import Trace
from tokenworks.core.training import fit
from tokenworks.reproduce.sentiment import PAIRS, Sentiment
from tokenworks.reproduce.writing import Written, collate_texts, states

SHOTS = (
    "Question: Max has 12 pens. He buys 7 more. How many pens does he have?\n"
    "Answer: Max has 12 pens and buys 7 pens. 12 + 7 = 19. Max has 19 pens.\n\n"
    "Question: Zoe has 31 beads. She gives 5 away. How many beads does she have?\n"
    "Answer: Zoe has 31 beads and gives 5 beads away. 31 - 5 = 26. Zoe has 26 beads.\n\n"
)
NAMES = {"Tom": "He", "Ann": "She", "Ben": "He", "Eve": "She", "Sam": "He", "Lea": "She"}
THINGS = ("apples", "books", "coins", "cards", "stamps", "shells")

Question = tuple[str, str, int, int]
"""Who, what, how many, and how many more: below 0, so many are given away."""

MARKED: tuple[tuple[Question, str], ...] = (
    (("Eve", "cards", 13, -6), " Eve has 13 cards and gives 6 cards away. 13 - 6 = *6. Eve has 6 cards."),
    (("Eve", "cards", 30, 9), " Eve has 30 cards and buys 9 cards. 30* - 9 = 17. Eve has 17 cards."),
    (("Ann", "stamps", 19, 6), " She has 19 stamps and buys 6 more. 19* - 6 = 9. She has 9 stamps."),
    (("Tom", "stamps", 27, 4), " Tom has 27 stamps and buys 4 more. 27 + 4 = *51. Tom has 51 stamps."),
    (("Lea", "apples", 32, -9), " Lea has 32 apples and gives 9 apples. 32 - 9 = 2*1. Lea has 21 apples."),
    (("Ben", "cards", 31, -5), " Ben has 31 cards and gives 5 cards away. 31 - 5 = 2*0. Ben has 20 cards."),
    (("Eve", "cards", 44, 6), " Eve has 44 cards and* gives 6 cards to Eve. 44 - 6 = 20. Eve has 20 cards."),
    (("Ben", "books", 31, 3), " Ben has 31 books and buys 3 books. 31* - 3 = 22. Ben has 22 books."),
    (("Sam", "books", 26, -4), " Sam has 26 books and gives 4 books away. 26 - 4 = *12. Sam has 12 books."),
    (("Lea", "shells", 11, -9), " Lea has 11 shells and gives 9 shells away. 11 - 9 = *1. Lea has 1 shell."),
)
"""Wrong answers that SmolLM2 wrote; the star stands before the token with which each is lost."""

ASKED, SAMPLES, LONGEST = 120, 8, 32
EPOCHS, RATE = 3, 1e-4


def prompt(question: Question) -> str:
    who, what, many, more = question
    does = f"buys {more} more" if more > 0 else f"gives {-more} away"
    he = NAMES[who]
    return f"Question: {who} has {many} {what}. {he} {does}. How many {what} does {he.lower()} have?\nAnswer:"


def is_right(question: Question, text: str) -> bool:
    """Whether the last sentence has the sum, and no other number."""
    last = text.strip().rstrip(".").split(". ")[-1].split()
    return [word for word in last if word.isdigit()] == [str(question[2] + question[3])]


def split(text: str) -> tuple[str, int]:
    """A marked answer without its star, and the character at which the critical token begins."""
    place = text.index("*")
    return text.replace("*", ""), place


def demonstrate() -> dict[str, Any]:
    """Under "chains" of each marked answer its "ids", the "critical" place, and of each token "contrastive" and
    "surprise"; under "traces" two of them to look at."""
    bench = Sentiment()
    tokenizer = bench.tokenizer
    right, wrong = _answers(bench)
    p, n = (bench.whole(_tuned(bench, texts)) for texts in (right, wrong))
    score = contrastive_scores(p, n)
    found: dict[str, Any] = {"right": len(right), "wrong": len(wrong), "chains": []}
    for question, marked in MARKED:
        text, place = split(marked)
        read = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        ids: list[int] = read["input_ids"]
        begin: list[int] = tokenizer(prompt(question))["input_ids"]
        surprise = (-token_log_probs(bench.model, begin, ids)).tolist()
        found["chains"].append(
            {"ids": ids, "critical": [start for start, _ in read["offset_mapping"]].index(place),
             "contrastive": [1 - s for s in score(begin, ids)], "surprise": surprise,
             "question": prompt(question)}
        )  # fmt: skip
    found["traces"] = [_trace(chain, tokenizer) for chain in found["chains"][:2]]
    return found


def _trace(chain: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    trace = Trace.from_ids(chain["ids"], tokenizer)
    trace.add("weight", chain["contrastive"], "1 - s, of the rejected token in cDPO", 0, 1)
    trace.add("surprise", chain["surprise"], "-log p of SmolLM2, in nats")
    trace.meta |= {"title": f"SmolLM2 to: {chain['question']}", "critical": chain["critical"]}
    return trace.to_dict()


def _answers(bench: Sentiment) -> tuple[list[Written], list[Written]]:
    """What SmolLM2 answers to other questions, the right answers and as many of the wrong ones at most thrice."""
    rng, tokenizer = random.Random(1), bench.tokenizer
    kept = {question for question, _ in MARKED}
    asked: list[Question] = []
    while len(asked) < ASKED:
        more = rng.choice((-1, 1)) * rng.randint(2, 9)
        question = (rng.choice(list(NAMES)), rng.choice(THINGS), rng.randint(11, 49), more)
        if question not in kept:
            asked.append(question)
    ends = [tokenizer.eos_token_id, *(i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i]))]
    shown = [tokenizer(SHOTS + prompt(question))["input_ids"] for question in asked]
    made = sample_continuations(bench.model, shown, SAMPLES, LONGEST, Sampling(0.7), ends, 0)
    sides: tuple[list[tuple[list[int], list[int]]], ...] = ([], [])
    for question, own in zip(asked, made, strict=True):
        begin = list(tokenizer(prompt(question))["input_ids"])
        for ids in own:
            if ids[-1] in ends:
                text = str(tokenizer.decode(ids, skip_special_tokens=True))
                sides[not is_right(question, text)].append((begin, ids))
    right, wrong = sides
    wrong = rng.sample(wrong, min(len(wrong), 3 * len(right)))
    return _written(bench, right), _written(bench, wrong)


def _written(bench: Sentiment, texts: Sequence[tuple[list[int], list[int]]]) -> list[Written]:
    trunks = bench.trunks([begin + ids for begin, ids in texts])
    return [Written(begin, ids, trunk) for (begin, ids), trunk in zip(texts, trunks, strict=True)]


def _tuned(bench: Sentiment, texts: list[Written]) -> Any:
    """The last layers, tuned to write such answers."""
    policy, trained = bench.begin()
    order = [text for epoch in range(EPOCHS) for text in random.Random(epoch).sample(texts, len(texts))]

    def loss(step: int) -> Tensor:
        batch = collate_texts(order[step * PAIRS : (step + 1) * PAIRS])
        labels = batch.labels[batch.mask]
        return -vocabulary_terms(Head.of(policy), states(policy, batch), labels).log_p.mean()

    fit(trained, loss, max(1, len(order) // PAIRS), RATE, warmup=0.1)
    return policy.requires_grad_(False)
