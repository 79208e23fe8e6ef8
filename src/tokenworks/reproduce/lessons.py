"""What cDPO's reproduction trains and asks: wrong chains and where they were lost, and policies of each loss.

Questions, chains and the checker are those of `reproduce.reasoner`.

    truth = wrong_chains(reasoner, 24)               # with the critical tokens that rollouts define
    lesson = Lesson(reasoner, 400, 16, seed=0)       # a seed's samples, pairs and models
    lesson.accuracy("DPO", 3e-5, questions("test", 1000))
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenworks.align.cdpo import CDPO
from tokenworks.align.contract import Needs, Outcome, Pairs, PreferenceMethod, halves
from tokenworks.align.critical import (
    Sample,
    StartupData,
    build_startup_data,
    critical_tokens_by_rollout,
    replacement_test,
)
from tokenworks.align.dpo import DPO
from tokenworks.align.reading import EncodedPair, collate, encode_pair, read_pairs
from tokenworks.align.rollouts import sample_continuations
from tokenworks.align.scores import contrastive_scores, response_states
from tokenworks.align.vocabulary import Head, vocabulary_terms
from tokenworks.core.sampling import Sampling
from tokenworks.core.training import fit
from tokenworks.reproduce.ledger import Ledger
from tokenworks.reproduce.reasoner import (
    LONGEST,
    Question,
    Reasoner,
    answer,
    first_wrong,
    is_right,
    questions,
    rows,
)

BETA, GAMMA = 0.1, 1.0
ROLLOUTS = 64
PAIRS, EPOCHS = 16, 3
"""Of preference training."""

RATES = (1e-5, 3e-5, 1e-4)
"""Each method trains at the one that did best for it with a lesson and on questions used for nothing else."""

TRIAL_SEED, TRIAL_QUESTIONS = 1000, 400

TUNED_ROWS, TUNED_RATE, TUNED_EPOCHS = 32, 3e-4, 3
"""Of the models of right and of wrong chains, and of training on right ones alone."""

OURS, RELEASED, SHUFFLED, SFT = "cDPO", "cDPO, released", "cDPO, shuffled scores", "right chains only"
METHODS = (SFT, "DPO", "RPO", OURS, RELEASED, SHUFFLED)
DETECTORS = ("contrastive", "surprise", "entropy", "random")

Piece = dict[str, Any]


# --- rollouts -------------------------------------------------------------------------------------------------


def answers(reasoner: Reasoner, chosen: Sequence[Question], n: int, seed: int) -> list[list[str]]:
    """`n` answers to each question, at temperature 1; greedy ones if n is 0."""
    tokenizer = reasoner.tokenizer
    prompts = [list(tokenizer(q.prompt)["input_ids"]) for q in chosen]
    sampling = Sampling(1.0 if n else 0.0)
    written = sample_continuations(
        reasoner.model, prompts, max(1, n), LONGEST, sampling, [tokenizer.eos_token_id], seed
    )
    return [[str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in own] for own in written]


def wrong_chains(reasoner: Reasoner, count: int) -> list[Piece]:
    """Wrong chains, where rollouts say that they were lost, and what another token there would do."""
    found: list[Piece] = []
    chosen = questions("lessons", 20 * count, seed=10_000)
    written = answers(reasoner, chosen, 1, seed=0)
    lost = [(q, own[0]) for q, own in zip(chosen, written, strict=True) if not is_right(q.prompt)(own[0])]
    for question, text in lost[:count]:
        common: Piece = {"top_p": 1.0, "max_new_tokens": LONGEST, "n": ROLLOUTS, "seed": len(found)}
        args = (reasoner.model, reasoner.tokenizer, question.prompt, text)
        by_rollout = critical_tokens_by_rollout(*args, is_right(question.prompt), **common)
        piece: Piece = {
            "prompt": question.prompt, "text": text, "index": by_rollout.index, "scores": by_rollout.scores,
            "wrong": first_wrong(text, question.chain), "ids": by_rollout.token_ids,
        }  # fmt: skip
        if by_rollout.index is not None and by_rollout.index < len(text):
            others = [place for place in range(len(text)) if place != by_rollout.index]
            elsewhere = random.Random(len(found)).choice(others)
            for name, place in (("critical", by_rollout.index), ("elsewhere", elsewhere)):
                tried = replacement_test(*args, place, is_right(question.prompt), **common)
                piece[name] = {"kept": tried.kept, "replaced": tried.replaced, "place": place}
        found.append(piece)
    return found


# --- what a seed trains ---------------------------------------------------------------------------------------


class Lesson:
    """The samples of a seed, the models of right and of wrong chains, and policies trained on the pairs."""

    def __init__(self, reasoner: Reasoner, asked: int, samples: int, seed: int) -> None:
        self.reasoner, self.seed = reasoner, seed
        self._asked, self._samples = asked, samples
        self._made: tuple[StartupData, PreTrainedModel, PreTrainedModel, list[EncodedPair], float] | None = None

    def _make(self) -> tuple[StartupData, PreTrainedModel, PreTrainedModel, list[EncodedPair], float]:
        """Once, and only if a piece of this seed is not done yet."""
        if self._made is None:
            chosen = questions("lessons", self._asked, self.seed)
            written = answers(self.reasoner, chosen, self._samples, self.seed)
            samples = {
                q.prompt: [Sample(text, answer(text)) for text in own]
                for q, own in zip(chosen, written, strict=True)
            }
            right = [is_right(prompt)(s.response) for prompt, own in samples.items() for s in own]
            data = build_startup_data(samples, is_right)
            p, n = (self._tuned(own, TUNED_RATE) for own in (data.positive, data.negative))
            score = contrastive_scores(p, n, GAMMA)
            pairs = []
            for prompt, chosen_text, rejected in data.pairs:
                pair = encode_pair(self.reasoner.tokenizer, prompt, chosen_text, rejected)
                good, bad = score(pair.prompt, pair.chosen), score(pair.prompt, pair.rejected)
                pairs.append(replace(pair, chosen_scores=good, rejected_scores=bad))
            self._made = data, p, n, pairs, sum(right) / len(right)
        return self._made

    def _tuned(self, texts: Sequence[tuple[str, str]], rate: float) -> PreTrainedModel:
        model = copy.deepcopy(self.reasoner.model)
        order = _order(len(texts), TUNED_EPOCHS, self.seed)

        def loss(step: int) -> Tensor:
            chosen = [texts[row] for row in order[step * TUNED_ROWS : (step + 1) * TUNED_ROWS]]
            ids, labels = rows(chosen, self.reasoner.tokenizer)
            found: Tensor = model(input_ids=ids, labels=labels).loss
            return found

        fit(model, loss, max(1, len(order) // TUNED_ROWS), rate, warmup=0.1)
        return model.eval()

    def detect(self, truth: Sequence[Piece]) -> Piece:
        """What each detector says of the tokens of the wrong chains; higher is more suspect."""
        data, p, n, pairs, accuracy = self._make()
        score, model = contrastive_scores(p, n, GAMMA), self.reasoner.model
        chance = random.Random(self.seed)
        suspicion: dict[str, list[list[float]]] = {name: [] for name in DETECTORS}
        for piece in truth:
            begin = list(self.reasoner.tokenizer(piece["prompt"])["input_ids"])
            suspicion["contrastive"].append([1 - s for s in score(begin, piece["ids"])])
            states = response_states(model, begin, piece["ids"])
            with torch.no_grad():
                terms = vocabulary_terms(Head.of(model), states, torch.tensor(piece["ids"]))
            suspicion["surprise"].append((-terms.log_p).tolist())
            suspicion["entropy"].append(terms.entropy.tolist())
            suspicion["random"].append([chance.random() for _ in piece["ids"]])
        sizes = {"positive": len(data.positive), "negative": len(data.negative), "pairs": len(pairs)}
        return {"suspicion": suspicion, "data": sizes, "accuracy": accuracy}

    def accuracy(self, name: str, rate: float, chosen: Sequence[Question]) -> list[float]:
        """Of each question, whether the greedy answer is right after training with a method."""
        return greedy_accuracy(self.reasoner, self._trained(name, rate), chosen)

    def _trained(self, name: str, rate: float) -> PreTrainedModel:
        data, _, _, pairs, _ = self._make()
        if name == SFT:
            return self._tuned(data.positive, rate)
        if name == SHUFFLED:
            chance = random.Random(self.seed)
            pairs = [
                replace(pair, rejected_scores=_shuffled(pair.rejected_scores or [], chance)) for pair in pairs
            ]
        methods: dict[str, PreferenceMethod] = {
            "DPO": DPO(BETA), "RPO": _RPO(), OURS: CDPO(BETA), RELEASED: CDPO(BETA, reduction="released"),
            SHUFFLED: CDPO(BETA),
        }  # fmt: skip
        method = methods[name]
        policy, reference = copy.deepcopy(self.reasoner.model), self.reasoner.model
        order = _order(len(pairs), EPOCHS, self.seed)

        def loss(step: int) -> Tensor:
            batch = collate([pairs[row] for row in order[step * PAIRS : (step + 1) * PAIRS]])
            return method(read_pairs(policy, reference, batch, method.needs)).loss.mean()

        fit(policy, loss, max(1, len(order) // PAIRS), rate, warmup=0.1)
        return policy.eval()


def best_rates(trial: Lesson, rates: Sequence[float], ledger: Ledger) -> dict[str, float]:
    """Of each method, the learning rate with the highest greedy accuracy after the trial lesson."""
    chosen = questions("lessons", TRIAL_QUESTIONS, seed=20_000)
    best = {}
    for name in METHODS:
        right = {
            rate: sum(ledger.once(f"trial/{name}/{rate}", partial(trial.accuracy, name, rate, chosen)))
            for rate in rates
        }
        best[name] = max(right, key=lambda rate: right[rate])
    return best


class _RPO:
    """DPO, and the mean log-likelihood of the chosen tokens with weight 1 (arXiv 2404.19733)."""

    needs = Needs()

    def __call__(self, pairs: Pairs) -> Outcome:
        found = DPO(BETA)(pairs)
        chosen, _ = halves(pairs.log_p.sum(1) / pairs.mask.sum(1))
        return replace(found, loss=found.loss - chosen)


def _order(count: int, epochs: int, seed: int) -> list[int]:
    return [
        row for epoch in range(epochs) for row in random.Random(1000 * seed + epoch).sample(range(count), count)
    ]


def _shuffled(scores: Sequence[float], chance: random.Random) -> list[float]:
    """All but the end's, which counts fully anyway."""
    inner = list(scores[:-1])
    chance.shuffle(inner)
    return [*inner, scores[-1]]


def greedy_accuracy(reasoner: Reasoner, model: PreTrainedModel, chosen: Sequence[Question]) -> list[float]:
    """Of each question, whether the greedy answer is right."""
    written = answers(replace(reasoner, model=model), chosen, 0, seed=0)
    return [float(is_right(q.prompt)(own[0])) for q, own in zip(chosen, written, strict=True)]
