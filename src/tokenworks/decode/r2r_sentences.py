"""Where would a text go after one token, and after another? The large model writes both sentences to their end.

R2R (arXiv 2505.21600) compares two tokens by the sentences that follow them, as a cheap stand-in for the whole
answers. Both are written by the large model, so that they differ by the one token alone; a verifier then says
whether they say different things.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from tokenworks.core.session import Session
from tokenworks.core.tree import ROOT, TokenTree, TreeShape
from tokenworks.decode.r2r_routers import SmallStep

Verifier = Callable[[str, str, str], int | None]
"""Takes the text before, the sentence with the small model's token and that with the large model's; returns 1 if
they say different things, 0 if not, None if it cannot tell."""

SENTENCE = 32
"""Tokens after which a sentence is compared even if it has not ended."""

SAME_WORDS = 0.75
"""Share of words that two sentences must have in common to say the same."""


def same_words(context: str, ours: str, theirs: str) -> int:
    """The verifier that needs no third model: divergent if fewer than `SAME_WORDS` of the words are the same (the
    harmonic mean of both shares). A stand-in: the paper asks a model of 72 billion parameters, and words that
    differ may mean the same."""
    one, other = (Counter(re.findall(r"\w+|[^\w\s]", text.lower())) for text in (ours, theirs))
    total = sum(one.values()) + sum(other.values())
    return int(total > 0 and 2 * sum((one & other).values()) / total < SAME_WORDS)


def ends_sentence(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether a token is a separator: the end of a text, of a sentence or of a line."""
    if token in tokenizer.all_special_ids:
        return True
    text = str(tokenizer.decode([token]))
    return "\n" in text or text.rstrip().endswith((".", "!", "?", ":", ";"))


def sentence(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The text of `tokens` up to the first separator, and of at most `SENTENCE` of them."""
    end = next((n for n, token in enumerate(tokens[:SENTENCE], 1) if ends_sentence(tokenizer, token)), SENTENCE)
    return str(tokenizer.decode(list(tokens[:end]), skip_special_tokens=True))


def continue_sentences(
    large: Session, tokenizer: PreTrainedTokenizerBase, above: Sequence[int], firsts: Sequence[int], longest: int
) -> list[str]:
    """For each branch the sentence that the large model, greedily, makes of its first token.

    All branches are one token tree: every pass adds a token to each that has not ended. They are pending in
    `large` afterwards, for the caller to roll back.

    Args:
        above: for each branch the pending node that it continues, or `ROOT` for the committed context.
        firsts: for each its first token.
        longest: tokens before the branch that begins last; sentences end with the large model's context.
    """
    written = [[first] for first in firsts]
    above = list(above)
    alive = [number for number, first in enumerate(firsts) if not ends_sentence(tokenizer, first)]
    for _ in range(min(SENTENCE - 1, large.context_limit - longest)):
        if not alive:
            break
        node = large.pending
        shape = TreeShape(tuple(above[number] for number in alive), node)
        logits = large.extend(TokenTree(torch.tensor([written[number][-1] for number in alive]), shape))
        for number, token in zip(alive, logits.argmax(-1).tolist(), strict=True):
            above[number] = node
            node += 1
            written[number].append(token)
        alive = [number for number in alive if not ends_sentence(tokenizer, written[number][-1])]
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in written]


class OracleRouter:
    """Asks the large model itself at every token: 1 where the two, greedily, choose differently, else 0. The text
    is the large model's, and nothing is saved.

    Args:
        large: of the large model, but not the decoder's own Session.
    """

    threshold = 0.5

    def __init__(self, large: Session) -> None:
        self._large = large

    def score(self, step: SmallStep) -> float:
        return float(_choice(self._large, step.context) != step.token)


class PathOracle(OracleRouter):
    """Path-following routing, which the learned router imitates: where the two choose differently, the large model
    writes both sentences to their end, and a verifier says whether they say different things.

    Args:
        large: of the large model, but not the decoder's own Session.
        tokenizer: both models'.
        verifier: see `Verifier`; where it cannot tell, the large model's token is taken.
    """

    def __init__(
        self, large: Session, tokenizer: PreTrainedTokenizerBase, verifier: Verifier = same_words
    ) -> None:
        super().__init__(large)
        self._tokenizer, self._verifier = tokenizer, verifier

    def score(self, step: SmallStep) -> float:
        theirs = _choice(self._large, step.context)
        if theirs == step.token:
            return 0.0
        pair, before = (step.token, theirs), len(step.context)
        mine, other = continue_sentences(self._large, self._tokenizer, (ROOT, ROOT), pair, before)
        self._large.rollback()
        verdict = self._verifier(str(self._tokenizer.decode(list(step.context))), mine, other)
        return 0.0 if verdict == 0 else 1.0


def _choice(large: Session, context: Sequence[int]) -> int:
    """The greedy token after `context`, of which the engine reads only what it has not read."""
    context = list(context)
    if large.length >= len(context) or large.tokens != context[: large.length]:
        large.rollback(0)
    return int(large.prefill(context[large.length :]).argmax())
