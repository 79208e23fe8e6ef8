"""DraftModel: a small model that drafts for a larger one, and the tree it grows.

SpecTr, RSD and DySpec differ in which children they draw where. What they share is here: the draft's own cache,
kept in step with what the target confirmed, and a tree that is run level by level, or node by node.

    tree = draft.plant(context)      # the root: the last confirmed token
    child = tree.add(0, index)       # a child of the root, by its place in the draft's vocabulary
    tree.run([child])                # one pass of the draft model over any number of nodes
    tree.distributions[child]        # what the child's own children are drawn from
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokenworks.core.errors import InputError
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Engine
from tokenworks.core.text import shared_length
from tokenworks.core.tree import ROOT, TokenTree, TreeShape
from tokenworks.decode.contract import Draft, Law, Verdict

GREEDY_TEMPERATURE = 0.6
"""What a draft is drawn at when the target is greedy; at 0 all its draws would be the same (DySpec's choice)."""


class DraftModel:
    """A draft model behind its Session.

    Args:
        session: of the draft model; it reads the target's token ids.
        vocab_size: V, the width of the target's logits.
        vocabulary: int64 [U], the target's ids that the draft's logits stand for, if its head knows only some of
            them. By default its logits are those of the first ids, cut to V.
        temperature: of the drafts; by default the target's own, or `GREEDY_TEMPERATURE` if that is 0.

    Attributes:
        passes: forward passes of the draft model since `start`.

    Raises:
        InputError: a vocabulary that does not fit the draft's logits or the target's.
    """

    def __init__(
        self,
        session: Engine,
        vocab_size: int,
        vocabulary: Tensor | None = None,
        temperature: float | None = None,
    ) -> None:
        if vocabulary is None:
            vocabulary = torch.arange(min(session.vocab_size, vocab_size))
        elif vocabulary.shape != (session.vocab_size,) or not 0 <= int(vocabulary.max()) < vocab_size:
            raise InputError(
                f"vocabulary: expected {session.vocab_size} ids below {vocab_size}, got {list(vocabulary.shape)}"
            )
        self.session, self.vocab_size, self.vocabulary = session, vocab_size, vocabulary
        self.passes = 0
        self._temperature = temperature
        self.sampling = Sampling(temperature=1.0)
        self.generator: torch.Generator | None = None

    def start(self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator | None) -> None:
        """A new sequence; what it shares with the last one stays in the draft's cache."""
        self.session.rollback(shared_length(self.session.tokens, prompt[:-1]))
        heat = self._temperature
        if heat is None:
            heat = GREEDY_TEMPERATURE if sampling.greedy else sampling.temperature
        self.sampling, self.generator, self.passes = replace(sampling, temperature=heat), generator, 0

    def plant(self, context: Sequence[int]) -> DraftTree:
        """Read what was confirmed since the last draft, and begin a tree under the last token of `context`."""
        # Drafts that were never verified leave nothing behind.
        self.session.rollback(shared_length(self.session.tokens, context[:-1]))
        return DraftTree(self, context[-1], self.logits(context[self.session.length :]))

    def logits(self, new: Sequence[int]) -> Tensor:
        """The draft's logits [U] after `new` tokens, which are committed."""
        self.passes += 1
        return self.session.prefill(new)[: len(self.vocabulary)]

    def distribution(self, logits: Tensor) -> Tensor:
        """What children are drawn from: float32 [..., U]."""
        return self.sampling.distribution(logits)


class ModelDrafter:
    """What all drafters with a draft model do alike; each has its own way to `grow` a tree.

    Args:
        model: the draft model.
    """

    name: str
    law: Law

    def __init__(self, model: DraftModel) -> None:
        self.model = model
        self._tree: DraftTree | None = None

    def start(self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator | None) -> None:
        self.model.start(prompt, sampling, generator)

    def propose(self, context: Sequence[int], room: int) -> Draft:
        """A tree grown from the draft model; the root alone where neither model has room for more."""
        room = min(room, self.model.session.context_limit - len(context))
        if room < 1:
            self._tree = None
            nothing = None if self.law is Law.FIXED else torch.zeros(1, self.model.vocab_size)
            return Draft(TokenTree.of([context[-1]], [ROOT]), nothing)
        self._tree = self.model.plant(context)
        return self.grow(self._tree, room)

    def grow(self, tree: DraftTree, room: int) -> Draft:
        """Add children to `tree`, at most `room` (>= 1) levels of them."""
        raise NotImplementedError

    def observe(self, draft: Draft, logits: Tensor, verdict: Verdict) -> None:
        if self._tree is not None:
            self._tree.keep(verdict)


class DraftTree:
    """A tree under growth. Node 0 is the root, which has been run.

    Attributes:
        tokens: for each node its token, in the target's ids.
        parents: for each node its parent.
        distributions: for each node that has been run, the distribution float32 [U] over its children.
    """

    def __init__(self, model: DraftModel, root: int, logits: Tensor) -> None:
        self._model = model
        self.tokens, self.parents, self.depths = [root], [ROOT], [0]
        self.distributions = {0: model.distribution(logits)}
        self._slots: dict[int, int] = {0: ROOT}

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, index: int) -> int:
        """Hang entry `index` of the draft's vocabulary under `parent`; returns the new node."""
        self.tokens.append(int(self._model.vocabulary[index]))
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        return len(self.tokens) - 1

    def run(self, nodes: Sequence[int]) -> None:
        """One pass of the draft model over `nodes`, whose parents have been run."""
        first = len(self._slots) - 1
        shape = TreeShape(tuple(self._slots[self.parents[node]] for node in nodes), first)
        tokens = torch.tensor([self.tokens[node] for node in nodes])
        logits = self._model.session.extend(TokenTree(tokens, shape))[:, : len(self._model.vocabulary)]
        self._model.passes += 1
        self._slots.update(zip(nodes, range(first, first + len(nodes)), strict=True))
        self.distributions.update(zip(nodes, self._model.distribution(logits), strict=True))

    def finish(self, drawn: bool = True, draws: Sequence[Sequence[int]] | None = None) -> Draft:
        """The Draft, with the distributions if its children were `drawn` from them."""
        tree = TokenTree.of(self.tokens, self.parents)
        if not drawn:
            return Draft(tree)
        # Only rows of nodes with children are touched; the rest of the zeros cost no memory.
        probabilities = torch.zeros(len(tree), self._model.vocab_size)
        for node, children in enumerate(tree.shape.children):
            if children:
                probabilities[node, self._model.vocabulary] = self.distributions[node]
        return Draft(tree, probabilities, draws)

    def keep(self, verdict: Verdict) -> None:
        """Commit to the draft's cache what it ran of the accepted path, and forget the rest."""
        self._model.session.commit([self._slots[node] for node in verdict.path[1:] if node in self._slots])
