"""FreeCache and Guided Diffusion (Hu et al., "FlashDLM", arXiv 2505.21467): faster masked-diffusion decoding.

A masked-diffusion model fills masked slots over many steps, each of which runs the whole text again. Two remedies,
neither of which trains anything:

    FreeCache         Keys and values of clean tokens hardly change any more. From some position c on the text is
                      run; what stands before c is read from the cache, as it was when it was last run.
    Guided diffusion  The model proposes a token for every masked slot at once. A small causal model reads the
                      proposals and says how many, from the left, go together; those are kept. It never writes.

What is frozen makes the result approximate; with nothing frozen it is the plain sampler's, token by token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from tokenworks.core.errors import InputError
from tokenworks.core.session import Session, SlotCache
from tokenworks.decode.diffusion import Diffusion, OnTokens, Writing
from tokenworks.decode.masked_diffusion import MaskedDiffusionLM

Policy = Literal["none", "prompt", "block", "aggressive", "sliding"]
Rule = Literal["deterministic", "topk-relative", "topk", "threshold", "sampled"]

CHUNK = 32
"""Proposals that the guide reads at a time."""


class FreeCache:
    """The model behind a cache of approximate keys and values.

    Args:
        model: the diffusion model.
        policy: where the text is cut. "none": nowhere, it is run whole at every step. "prompt": behind the prompt.
            "block": behind the last clean block. "aggressive": behind the last clean token. "sliding": `window`
            tokens before the last clean one, so that young keys and values are refreshed for a while.
        block: tokens of a block, counted from the prompt's end.
        window: W of "sliding", at least 0.
        refresh_interval: run the whole text every so many steps; None never.
        freeze_early: also freeze tokens that were still masked when they were last run, as the official code does
            at the end of a block. By default a position is frozen only if it was clean in the input of the pass
            that gave its keys and values.

    Attributes:
        tokens_fed: positions run so far.
        passes: forward passes so far.

    Raises:
        InputError: an unknown policy or a number out of range.
    """

    def __init__(
        self,
        model: MaskedDiffusionLM,
        policy: Policy = "sliding",
        block: int = 32,
        window: int = 32,
        refresh_interval: int | None = None,
        freeze_early: bool = False,
    ) -> None:
        if policy not in get_args(Policy):
            raise InputError(f"policy: there is no {policy!r}; choose {', '.join(get_args(Policy))}")
        if block < 1 or window < 0 or (refresh_interval is not None and refresh_interval < 1):
            raise InputError(
                f"block: {block} must be at least 1, window: {window} at least 0, and refresh_interval: "
                f"{refresh_interval} at least 1 or None"
            )
        self.model, self.policy, self.block, self.window = model, policy, block, window
        self.refresh_interval, self.freeze_early = refresh_interval, freeze_early
        self.start(0)

    def start(self, prompt_length: int) -> None:
        """A new text, whose first tokens are the prompt."""
        self._prompt = prompt_length
        self._slots = SlotCache()
        self._settled = 0
        self.tokens_fed = self.passes = 0

    def logits(self, tokens: Tensor) -> tuple[int, Tensor]:
        """Run what has to be run of `tokens` [L].

        Returns:
            The first slot that has a prediction, and those of it and all later slots: float [n, V].
        """
        clean = tokens != self.model.mask_token_id
        prefix = int(clean.long().cumprod(0).sum())
        cut = self._cut(prefix)
        # A shifted model predicts a slot at the position before it.
        start = max(0, cut - 1) if self.model.shifted else cut
        found = self.model.logits(tokens, start, self._slots)
        self._settled = prefix
        self.tokens_fed += len(tokens) - start
        self.passes += 1
        if not self.model.shifted:
            return start, found
        rows = torch.cat([found[:1], found]) if start == 0 else found
        return (0 if start == 0 else start + 1), rows[:-1]

    def _cut(self, prefix: int) -> int:
        """c, given how many tokens are clean from the left: what stands before it is frozen."""
        if self.policy == "none" or self.passes == 0:
            return 0
        if self.refresh_interval is not None and self.passes % self.refresh_interval == 0:
            return 0
        # What was clean already when it was last run; at least one masked slot lies behind it.
        known = prefix if self.freeze_early else self._settled
        return {
            "prompt": self._prompt,
            "block": self._prompt + (known - self._prompt) // self.block * self.block,
            "aggressive": known,
            "sliding": max(0, known - self.window),
        }[self.policy]


def generate_guided(
    cache: FreeCache,
    guide: Session,
    prompt: Sequence[int] | Tensor,
    length: int,
    rule: Rule = "deterministic",
    top_k: int = 2,
    ratio: float = 0.5,
    stop_ids: Iterable[int] = (),
    seed: int | None = None,
    on_tokens: OnTokens | None = None,
) -> Diffusion:
    """Guided diffusion: from the left, as many proposals are kept as the guide finds to go together.

    Args:
        cache: the diffusion model, with or without FreeCache.
        guide: a causal model with the same token ids.
        prompt: [P] token ids.
        length: G >= 1 slots to fill.
        rule: what the guide accepts, q its distribution: "deterministic", its first choice; "topk-relative", one
            of its `top_k` choices of at least `ratio` times the probability of the first; "topk", one of its
            `top_k`; "threshold", q > `ratio`; "sampled", with probability q.
        stop_ids: the text ends with the first of these that is kept; the other slots are filled with it.
        seed: of "sampled"; None takes PyTorch's own state.
        on_tokens: as in `generate_diffusion`.

    Raises:
        InputError: as `generate_diffusion`; an unknown rule, or a guide with another vocabulary than the model.
    """
    if rule not in get_args(Rule):
        raise InputError(f"rule: there is no {rule!r}; choose {', '.join(get_args(Rule))}")
    if guide.vocab_size != cache.model.vocab_size:
        raise InputError(
            f"guide: its vocabulary has {guide.vocab_size} tokens and the diffusion model's "
            f"{cache.model.vocab_size}; both must have the same tokenizer"
        )
    state, stops = Writing(cache, prompt, length, on_tokens), frozenset(stop_ids)
    chance = None if seed is None else torch.Generator().manual_seed(seed)
    guide.rollback(0)
    while state.masked:
        begin, logits = state.propose()
        slot = state.next_slot
        own = logits[slot - begin :]
        proposals: list[int] = own.argmax(-1).tolist()
        kept, chances = _guided(state, guide, proposals, rule, top_k, ratio, chance)
        # Every step writes at least one token: the model's own first choice.
        source, count = ("guided", kept) if kept else ("free", 1)
        stop = next((i for i, token in enumerate(proposals[:count]) if token in stops), None)
        count = count if stop is None else stop + 1
        state.write(list(range(slot, slot + count)), own[:count], source, chances)
        if stop is not None:
            state.end(proposals[stop])
    return state.finish()


def _guided(
    state: Writing,
    guide: Session,
    proposals: list[int],
    rule: Rule,
    top_k: int,
    ratio: float,
    chance: torch.Generator | None,
) -> tuple[int, list[float]]:
    """How many of the proposals the guide accepts from the left, and its probability of each that it read."""
    known = state.ids[: state.next_slot].tolist()
    # What was cut off by a rejection is forgotten; the last token known is read again, with the proposals.
    guide.rollback(min(guide.length, len(known) - 1))
    guide_has = guide.length
    if guide_has < len(known) - 1:
        guide.prefill(known[guide_has:-1])
        state.found.guide_calls += 1
    accepted, chances, last = 0, [], known[-1]
    while accepted < len(proposals):
        part = proposals[accepted : accepted + CHUNK]
        logits = guide.extend([last, *part[:-1]])
        state.found.guide_calls += 1
        good = 0
        for token, row in zip(part, logits, strict=True):
            q = torch.softmax(row, -1)
            chances.append(float(q[token]))
            if not accepts(q, token, rule, top_k, ratio, chance):
                break
            good += 1
        # Kept tokens stay in the guide's cache, but for the last of them, which is read with the next proposals.
        guide.commit(list(range(max(good, 1))))
        accepted += good
        if good < len(part):
            break
        last = part[-1]
    return accepted, chances


def accepts(
    q: Tensor, token: int, rule: Rule, top_k: int = 2, ratio: float = 0.5, chance: torch.Generator | None = None
) -> bool:
    """Whether the guide, of distribution q [V], lets a token pass."""
    own = float(q[token])
    if rule == "deterministic":
        return int(q.argmax()) == token
    if rule == "threshold":
        return own > ratio
    if rule == "sampled":
        return float(torch.rand((), generator=chance)) < own
    if int((q > own).sum()) >= top_k:
        return False
    return rule == "topk" or own >= ratio * float(q.max())
