"""Critical tokens: where a wrong chain of thought is lost, by definition and by rollouts (arXiv 2411.19943).

    checker = is_right("37+58-21+46:")                      # yours: text of a response -> whether it is right
    found = critical_tokens_by_rollout(model, tokenizer, prompt, wrong_response, checker)
    found.index, found.scores                               # the critical token; right rollouts after each token
    test = replacement_test(model, tokenizer, prompt, wrong_response, found.index, checker)

From behind each token of a wrong response n continuations are sampled; its score is how many come out right. The
critical token is the first with score 0 behind which no score climbs above `high` again. Rollouts are the truth
that the cheap scores (`align.scores.contrastive_scores`) stand in for, and cost n texts a token: mind the budget.

`build_startup_data` makes of sampled answers what the two models of those scores, and the preference method
(`align.cdpo`), are trained on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenworks.align.rollouts import sample_continuations
from tokenworks.core.errors import InputError
from tokenworks.core.sampling import Sampling
from tokenworks.core.text import stop_ids
from tokenworks.core.trace import Trace

Checker = Callable[[str], bool]
"""Whether a whole response, without the end of text, is right."""

COVERED = 0.5
"""Wrong answers are taken, the most frequent first, until they are this share of the wrong samples."""


@dataclass(frozen=True)
class CriticalTokens:
    """What rollouts found in one response of T tokens.

    Attributes:
        index: of the critical token, from 0; None if there is none.
        scores: for each token how many of the `n` continuations from behind it came out right.
        token_ids: the response's.
    """

    index: int | None
    scores: list[int]
    n: int
    token_ids: list[int]

    def trace(self, tokenizer: PreTrainedTokenizerBase) -> Trace:
        """Channels "success" (share of right rollouts) and "critical"."""
        trace = Trace.from_ids(self.token_ids, tokenizer)
        shares = [score / self.n for score in self.scores]
        trace.add("success", shares, f"share of {self.n} rollouts from behind the token that came out right", 0, 1)
        marks = ["critical" if place == self.index else None for place in range(len(shares))]
        trace.add("critical", marks, "the first token after which nothing comes right again")
        trace.meta |= {"title": "critical token by rollouts", "index": self.index, "rollouts": self.n}
        return trace


@dataclass(frozen=True)
class Replacement:
    """Right ones among `n` rollouts from behind the token (`kept`) and from before it (`replaced`)."""

    kept: int
    replaced: int
    n: int

    def pass_at(self, k: int) -> tuple[float, float]:
        """pass@k with the token kept, and replaced."""
        return pass_at_k(self.n, self.kept, k), pass_at_k(self.n, self.replaced, k)


def critical_tokens_by_rollout(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    response: str,
    checker: Checker,
    n: int = 64,
    high: int = 3,
    temperature: float = 1.0,
    top_p: float = 0.95,
    max_new_tokens: int = 512,
    budget: int | None = None,
    seed: int | None = None,
) -> CriticalTokens:
    """Score every token of a wrong response by rollouts; the end of text is appended and scored too.

    Args:
        checker: is asked about response and continuation together.
        n, high: rollouts a token, and how many of them may come right behind a critical token all the same.
        temperature, top_p: of the rollouts; best those that the response was sampled with.
        budget: most rollouts in all; more are refused before any is made.

    Raises:
        InputError: an empty text, a response that is right, a number out of range, or more rollouts than `budget`.
    """
    begin, ids = _encoded(tokenizer, prompt, response)
    if checker(response):
        raise InputError("response: the checker says that it is right; critical tokens are those of wrong ones")
    _check_counts(n, high)
    if budget is not None and n * len(ids) > budget:
        raise InputError(
            f"budget: {n} rollouts behind each of {len(ids)} tokens are {n * len(ids)}, more than {budget}; take "
            "a smaller n or a shorter response, or raise it"
        )
    prefixes = [ids[: place + 1] for place in range(len(ids))]
    counts = _count_right(model, tokenizer, begin, prefixes, checker, n, temperature, top_p, max_new_tokens, seed)
    scores = [*counts, 0]  # behind the end nothing follows
    return CriticalTokens(find_critical(scores, n, high), scores, n, [*ids, *_end(tokenizer)])


def replacement_test(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    response: str,
    index: int,
    checker: Checker,
    n: int = 64,
    temperature: float = 1.0,
    top_p: float = 0.95,
    max_new_tokens: int = 512,
    seed: int | None = None,
) -> Replacement:
    """Does another token at `index` save the response?

    As in the authors' code the substitutes are draws of the model at that place, with replacement, of which the
    token itself may be one; each is continued once.

    Raises:
        InputError: an empty text, no such token, or a number out of range.
    """
    begin, ids = _encoded(tokenizer, prompt, response)
    _check_counts(n, 0)
    if not 0 <= index < len(ids):
        raise InputError(f"index: {index} is none of the response's {len(ids)} tokens")
    prefixes = [ids[: index + 1], ids[:index]]
    kept, replaced = _count_right(
        model, tokenizer, begin, prefixes, checker, n, temperature, top_p, max_new_tokens, seed
    )
    return Replacement(kept, replaced, n)


def find_critical(scores: Sequence[int], n: int = 64, high: int = 3) -> int | None:
    """The first token with score 0 behind which no score is above `high`; when one is, begin again behind it. If
    no other zero follows, the last candidate stands all the same; None if there never was one.

    Raises:
        InputError: a score that is not between 0 and n.
    """
    _check_counts(n, high)
    candidate: int | None = None
    given_up: int | None = None
    for place, score in enumerate(scores):
        if not 0 <= score <= n:
            raise InputError(f"scores: {score} at token {place} is not between 0 and n = {n}")
        if score == 0 and candidate is None:
            candidate = place
        elif score > high and candidate is not None:
            given_up, candidate = candidate, None
    return given_up if candidate is None else candidate


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that of k out of n samples, c of them right, one is right: 1 - C(n - c, k) / C(n, k).

    Raises:
        InputError: not 0 <= c <= n, or not 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise InputError(f"n, c, k: {n}, {c} and {k}; c is between 0 and n, and k between 1 and n")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


@dataclass(frozen=True)
class Sample:
    """One sampled response; `answer` is what it comes to, empty if it comes to nothing."""

    response: str
    answer: str


@dataclass(frozen=True)
class StartupData:
    """What contrastive estimation and cDPO are trained on.

    Attributes:
        positive, negative: (prompt, response) for the model of right and of wrong responses.
        pairs: (prompt, chosen, rejected).
    """

    positive: list[tuple[str, str]]
    negative: list[tuple[str, str]]
    pairs: list[tuple[str, str, str]]


def build_startup_data(samples: Mapping[str, Sequence[Sample]], checker: Callable[[str], Checker]) -> StartupData:
    """Choose from the samples of each prompt, as the authors do.

    Grouped by answer, the empty one dropped: the most frequent right answer gives the positive response and the
    chosen one; the most frequent wrong answer the rejected one. Wrong answers, the most frequent first, give a
    negative response each until they cover half of the wrong samples; behind the first only answers that came more
    than once. Of each answer the first sample stands for all, and of equally frequent answers the first seen comes
    first.

    Args:
        samples: by prompt.
        checker: gives each prompt's checker.

    Raises:
        InputError: no prompt has both a right and a wrong answer.
    """
    found = StartupData([], [], [])
    for prompt, own in samples.items():
        is_right = checker(prompt)
        first: dict[str, str] = {}
        for sample in own:
            if sample.answer:
                first.setdefault(sample.answer, sample.response)
        counts = Counter(sample.answer for sample in own if sample.answer)
        ranked = [answer for answer, _ in counts.most_common()]
        right = [answer for answer in ranked if is_right(first[answer])]
        wrong = [answer for answer in ranked if answer not in right]
        if right:
            found.positive.append((prompt, first[right[0]]))
        total, covered = sum(counts[answer] for answer in wrong), 0
        for place, answer in enumerate(wrong):
            if covered >= COVERED * total or (place > 0 and counts[answer] < 2):
                break
            found.negative.append((prompt, first[answer]))
            covered += counts[answer]
        if right and wrong:
            found.pairs.append((prompt, first[right[0]], first[wrong[0]]))
    if not found.pairs:
        raise InputError(
            "samples: no prompt has both a right and a wrong answer, so there is no pair; sample more, or at "
            "another temperature, or check the checker"
        )
    return found


def _encoded(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt and of the response, each tokenized by itself so that token j of the response stays at
    place j whatever the tokenizer puts before a text."""
    if not prompt or not response:
        raise InputError("prompt, response: empty; both need some text")
    return list(tokenizer(prompt)["input_ids"]), list(tokenizer(response, add_special_tokens=False)["input_ids"])


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError("tokenizer: it has no end of text; set its eos_token")
    return [end]


def _check_counts(n: int, high: int) -> None:
    if n < 1 or not 0 <= high <= n:
        raise InputError(f"n, high: {n} and {high}; n is at least 1 and high between 0 and n")


def _count_right(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    begin: list[int],
    prefixes: list[list[int]],
    checker: Checker,
    n: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    seed: int | None,
) -> list[int]:
    """Right ones among n rollouts from behind each prefix of the response."""
    stops = [*stop_ids(model, tokenizer), *_end(tokenizer)]
    sampling = Sampling(temperature, top_p=top_p)
    written = sample_continuations(
        model, [begin + prefix for prefix in prefixes], n, max_new_tokens, sampling, stops, seed
    )
    counts = []
    for prefix, rows in zip(prefixes, written, strict=True):
        texts = Counter(tuple(ids[:-1] if ids[-1] in stops else ids) for ids in rows)
        counts.append(
            sum(count for ids, count in texts.items() if checker(str(tokenizer.decode([*prefix, *ids]))))
        )
    return counts
