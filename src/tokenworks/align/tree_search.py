"""Monte-Carlo tree search over a DPO policy, its own likelihoods in place of a value network (arXiv 2404.12358).

The score of a text so far (`align.search`: the policy's likelihood, or the implicit reward) is, by the Bellman
identity, reward so far plus value of where it has come to. That is what a leaf is worth here, exactly in theory
and without rollouts. The prior of a token is the policy's probability. A simulation walks down from the prompt by

    Q(s, a) + exploration prior(a) sqrt(N(s)) / (1 + N(s, a))

(PUCT, as in AlphaZero; Q the mean worth of what was found below, brought to [0, 1] by the best and worst so far),
reads the first text that no simulation has read, and passes its score up. Texts that have ended, and those below
which all have, are not walked to again: with enough simulations every text is found, and the search says so
(`exhausted`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenworks.align.search import Found, Hypothesis, Scored, Scorer
from tokenworks.core.errors import InputError
from tokenworks.core.session import Engine


@dataclass
class Node:
    """A text in the tree.

    Attributes:
        prior: of its last token, under the policy.
        visits, worth: how many simulations came through here, and the sum of what they found.
        children: empty until the text was read, and for one that has ended.
        closed: nothing below is left to be found.
    """

    text: Hypothesis
    prior: float = 1.0
    visits: int = 0
    worth: float = 0.0
    children: list[Node] = field(default_factory=list)
    closed: bool = False


@torch.inference_mode()
def mcts(
    policy: Engine,
    prompt: Sequence[int] | Tensor,
    simulations: int = 100,
    max_new_tokens: int = 32,
    stop_ids: Iterable[int] = (),
    reference: Engine | None = None,
    scorer: Scorer = "policy",
    beta: float = 0.1,
    top_p: float = 0.95,
    width: int = 8,
    exploration: float = 1.0,
) -> Found:
    """Continue `prompt` by the best text that so many simulations find.

    Args:
        simulations: at least 1; each is one pass over one token at most. If none has come to an end by then, the
            most visited path is followed down by the policy's likeliest tokens.
        width: children of a text, the likeliest candidates under the policy; at least 1.
        exploration: weight of the prior, from 0 upwards.
        reference, scorer, beta, top_p: as in `align.search.beam_search`.

    Raises:
        InputError: a number out of range, an empty prompt, no room, or as `align.search.Scored`.
        NumericalError: a model returned NaN.
    """
    if simulations < 1 or width < 1 or not exploration >= 0:
        raise InputError(
            f"simulations, width, exploration: {simulations}, {width} and {exploration}; the first two are at "
            "least 1, the last from 0 upwards"
        )
    models = Scored(policy, reference, scorer, beta, top_p)
    search = _Search(models, width, exploration, frozenset((token,) for token in stop_ids))
    log_p, log_ref, search.limit = models.begin(prompt, max_new_tokens)
    root = Node(Hypothesis())
    search.spread(root, log_p[0], log_ref[0])
    for _ in range(simulations):
        if root.closed:
            break
        search.simulate(root)
    if not search.whole:
        search.finish(root)
    models.end()
    texts = sorted(search.whole, key=lambda text: -text.score)
    return Found(texts, beta, models.passes, root.closed)


class _Search:
    def __init__(self, models: Scored, width: int, exploration: float, stops: frozenset[tuple[int]]) -> None:
        self.models, self.width, self.exploration, self.stops = models, width, exploration, stops
        self.limit = 0
        self.whole: list[Hypothesis] = []
        self._range = (math.inf, -math.inf)

    def simulate(self, root: Node) -> None:
        """Walk down to a text that was not read yet, read it, and tell those above."""
        path = [root]
        while path[-1].children:
            path.append(max((c for c in path[-1].children if not c.closed), key=self._appeal(path[-1])))
        leaf = path[-1]
        if self._over(leaf.text):
            self.whole.append(leaf.text)
            leaf.closed = True
        else:
            self._expand(leaf)
        worth = leaf.text.score
        self._range = (min(self._range[0], worth), max(self._range[1], worth))
        for node in path:
            node.visits += 1
            node.worth += worth
        for node in reversed(path[:-1]):
            node.closed = all(child.closed for child in node.children)

    def finish(self, root: Node) -> None:
        """One whole text, where the simulations ended before any."""
        node = root
        while not self._over(node.text):
            if not node.children:
                self._expand(node)
            node = max(node.children, key=lambda child: (child.visits, child.prior))
        self.whole.append(node.text)

    def _expand(self, node: Node) -> None:
        (node.text,), log_p, log_ref = self.models.read([node.text])
        self.spread(node, log_p[0], log_ref[0])

    def spread(self, node: Node, log_p: Tensor, log_ref: Tensor) -> None:
        """Give a text its children, from the rows [V] after it."""
        gains = self.models.gains(log_p[None], log_ref[None])[0]
        allowed = torch.where(gains > -torch.inf, log_p, -torch.inf)
        for value, token in zip(
            *(part.tolist() for part in allowed.topk(min(self.width, len(allowed)))), strict=True
        ):
            if value > -torch.inf:
                score = node.text.score + float(gains[token])
                grown = self.models.grown(node.text, token, score, log_p, log_ref)
                node.children.append(Node(grown, math.exp(value)))

    def _over(self, text: Hypothesis) -> bool:
        return len(text.token_ids) == self.limit or text.token_ids[-1:] in self.stops

    def _appeal(self, parent: Node) -> Callable[[Node], float]:
        low, high = self._range
        spread = high - low

        def appeal(child: Node) -> float:
            # An unread text's own score is known already: it is its worth until something below is read.
            mean = child.worth / child.visits if child.visits else child.text.score
            share = min(1.0, max(0.0, (mean - low) / spread)) if spread > 0 else 0.5
            return share + self.exploration * child.prior * math.sqrt(parent.visits) / (1 + child.visits)

        return appeal
