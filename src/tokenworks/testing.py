"""Contract checks for drafters and verifiers, the user's own included.

    from tokenworks.testing import check_drafter, check_verifier

    check_drafter(MyDrafter(), session)    # proposals well formed, and the text is the target's own
    check_verifier(MyVerifier())           # the output follows the target's exact distribution

Both raise `AssertionError` with what is wrong. A verifier is put through a toy target whose distribution over all
strings can be enumerated, with a goodness-of-fit test that states its power.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenworks.core.measure import FitTest, goodness_of_fit
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Engine, Reader
from tokenworks.core.tree import ROOT, TokenTree
from tokenworks.decode.contract import Draft, Drafter, Law, Verdict, Verifier
from tokenworks.decode.speculative import SpeculativeDecoder


class ToyTarget:
    """An Engine whose next-token logits depend on the last token only, so that everything can be enumerated.

    Args:
        vocab_size: V, at least 2.
        seed: of the random logits table [V, V].
    """

    def __init__(self, vocab_size: int = 3, seed: int = 0) -> None:
        self.vocab_size = self.input_size = vocab_size
        self.context_limit, self.device = 64, torch.device("cpu")
        self.table = 0.7 * torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(seed))
        self.tokens: list[int] = []
        self._pending: list[int] = []

    @property
    def length(self) -> int:
        return len(self.tokens)

    def prefill(self, tokens: Sequence[int] | Tensor, reader: Reader | None = None) -> Tensor:
        self.tokens += [int(token) for token in tokens]
        if reader is not None:
            reader(torch.as_tensor(tokens), self.table[torch.as_tensor(tokens)])
        return self.table[self.tokens[-1]]

    def extend(self, tokens: Sequence[int] | Tensor | TokenTree) -> Tensor:
        ids = tokens.tokens if isinstance(tokens, TokenTree) else torch.as_tensor(tokens)
        self._pending += ids.tolist()
        return self.table[ids]

    def commit(self, path: Sequence[int] | None = None) -> None:
        self.tokens += self._pending if path is None else [self._pending[node] for node in path]
        self._pending = []

    def rollback(self, length: int | None = None) -> None:
        self._pending = []
        del self.tokens[self.length if length is None else length :]

    def string_probabilities(self, start: int, length: int, sampling: Sampling) -> dict[tuple[int, ...], float]:
        """The exact probability of every string of `length` tokens after `start`."""
        step = sampling.distribution(self.table.double())
        found = {}
        for string in itertools.product(range(self.vocab_size), repeat=length):
            probability = 1.0
            for before, after in itertools.pairwise((start, *string)):
                probability *= float(step[before, after])
            found[string] = probability
        total = sum(found.values())
        return {string: probability / total for string, probability in found.items()}


class ToyDrafter:
    """Two children for each node (one if the law is SINGLE), two levels deep, from a random draft distribution."""

    name = "toy"

    def __init__(self, law: Law, vocab_size: int = 3, seed: int = 1) -> None:
        self.law = law
        self._random = torch.Generator().manual_seed(seed)
        self.table = torch.softmax(torch.randn(vocab_size, vocab_size, generator=self._random), dim=-1)

    def start(self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator | None) -> None:
        pass

    def propose(self, context: Sequence[int], room: int) -> Draft:
        if room < 2:
            return Draft(
                TokenTree.of([context[-1]], [ROOT]), None if self.law is Law.FIXED else self.table[[context[-1]]]
            )
        tokens, parents = [context[-1]], [ROOT]
        for node in range(3 if self.law is not Law.SINGLE else 2):
            children = self._children(self.table[tokens[node]])
            tokens, parents = tokens + children, parents + [node] * len(children)
        probabilities = None if self.law is Law.FIXED else self.table[tokens]
        return Draft(TokenTree.of(tokens, parents), probabilities)

    def observe(self, draft: Draft, logits: Tensor, verdict: Verdict) -> None:
        pass

    def _children(self, q: Tensor) -> list[int]:
        if self.law is Law.FIXED:
            return q.topk(2).indices.tolist()
        count = 1 if self.law is Law.SINGLE else 2
        return torch.multinomial(q, count, self.law is Law.INDEPENDENT, generator=self._random).tolist()


def check_verifier(
    verifier: Verifier,
    sampling: Sampling | None = None,
    laws: Sequence[Law] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> dict[Law, FitTest]:
    """Put a verifier through draws of 3-token strings from a toy target, and compare with the exact distribution.

    Args:
        sampling: how the target is sampled; temperature 1 by default. Greedy is compared exactly.
        laws: the drafts to try; by default all that the verifier says it is exact for.
        draws: strings drawn for each law. 2,000 detect a distribution 0.1 off in total variation almost surely
            (each returned test states its power).

    Returns:
        The goodness-of-fit test of each law.

    Raises:
        AssertionError: a verdict is not a path of the draft, or the strings do not follow the target.
    """
    sampling = sampling if sampling is not None else Sampling(temperature=1.0)
    results = {}
    for law in laws if laws is not None else sorted(verifier.laws, key=lambda law: law.name):
        target, start, length = ToyTarget(), 0, 3
        exact = target.string_probabilities(start, length, sampling)
        drafter, watched = ToyDrafter(law), _Watched(verifier)
        torch.manual_seed(seed)
        counts: Counter[tuple[int, ...]] = Counter()
        for _ in range(draws):
            string = [start]
            while len(string) <= length:
                draft = drafter.propose(string, 2)
                verdict = watched.verify(draft, target.table[draft.tree.tokens], sampling, None)
                string += [*draft.tree.tokens[verdict.path[1:]].tolist(), verdict.bonus]
            counts[tuple(string[1 : length + 1])] += 1
        test = goodness_of_fit([counts[s] for s in exact], list(exact.values()), effect=0.1)
        assert test.passed, f"{verifier.name} does not follow the target for drafts that are {law.value}: {test}"
        results[law] = test
    return results


class _Watched:
    """A verifier whose every verdict is looked at before it is used."""

    def __init__(self, verifier: Verifier) -> None:
        self.name, self.laws, self._inner = verifier.name, verifier.laws, verifier

    def verify(
        self, draft: Draft, logits: Tensor, sampling: Sampling, generator: torch.Generator | None
    ) -> Verdict:
        verdict = self._inner.verify(draft, logits, sampling, generator)
        parents, path = draft.tree.shape.parents, verdict.path
        connected = path[:1] == [0] and all(parents[below] == above for above, below in itertools.pairwise(path))
        assert connected, f"{self.name}: path {path} does not lead down from the root (node 0)"
        assert 0 <= verdict.bonus < logits.shape[1], f"{self.name}: bonus {verdict.bonus} is not in the vocabulary"
        assert len(verdict.chances) == len(path) - 1, f"{self.name}: one chance for each accepted node is needed"
        assert all(0 <= chance <= 1 + 1e-6 for chance in verdict.chances), (
            f"{self.name}: a chance is not in [0, 1]"
        )
        return verdict


def check_drafter(
    drafter: Drafter, session: Engine, prompts: Sequence[Sequence[int]] | None = None, max_new_tokens: int = 24
) -> None:
    """Put a drafter through greedy decoding: its drafts are well formed and the text is that of plain decoding.

    Args:
        session: the target the drafter is made for; it is emptied.
        prompts: token ids; by default eight random prompts of one to twelve tokens.

    Raises:
        AssertionError: a draft is malformed, or the text or its length differs.
    """
    if prompts is None:
        random = torch.Generator().manual_seed(0)
        prompts = [
            torch.randint(session.vocab_size, (int(n),), generator=random).tolist()
            for n in range(1, 13, 2)
            for _ in "ab"
        ]
    plain = SpeculativeDecoder(session)
    for prompt in prompts:
        expected = plain.generate(prompt, max_new_tokens).token_ids
        watched = SpeculativeDecoder(session, _WatchedDrafter(drafter, session))
        found = watched.generate(prompt, max_new_tokens)
        assert found.token_ids == expected, f"{drafter.name}: {found.token_ids} differs from plain {expected}"
        assert found.target_passes <= len(expected), f"{drafter.name}: more passes than tokens"
        short = max(1, max_new_tokens // 2)
        cut = watched.generate(prompt, short).token_ids
        assert cut == expected[:short], f"{drafter.name}: max_new_tokens={short} gives {len(cut)} tokens"
        stop = expected[-1]
        stopped = watched.generate(prompt, max_new_tokens, [stop]).token_ids
        assert stopped == expected[: expected.index(stop) + 1], f"{drafter.name}: does not stop at token {stop}"


class _WatchedDrafter:
    """A drafter whose every draft is looked at before it is used."""

    def __init__(self, drafter: Drafter, session: Engine) -> None:
        self.name, self.law, self._inner, self._session = drafter.name, drafter.law, drafter, session
        self.start, self.observe = drafter.start, drafter.observe

    def propose(self, context: Sequence[int], room: int) -> Draft:
        draft = self._inner.propose(context, room)
        tree, q, name = draft.tree, draft.probabilities, self.name
        assert int(tree.tokens[0]) == context[-1], f"{name}: node 0 must hold the last token of the context"
        assert tree.shape.parents.count(ROOT) == 1, f"{name}: all nodes but node 0 must lie under node 0"
        depth = int(tree.shape.depths.max())
        assert depth <= room, f"{name}: the draft is {depth} levels deep, but there is room for {room}"
        inside = int(tree.tokens.min()) >= 0 and int(tree.tokens.max()) < self._session.input_size
        assert inside, f"{name}: a token is not one of the model's {self._session.input_size} inputs"
        for node, children in enumerate(tree.shape.children):
            assert set(draft.drawn(node)) == set(children), f"{name}: draws of node {node} are not its children"
        assert (q is None) == (self.law is Law.FIXED), (
            f"{name}: probabilities are for drafts that are drawn, not FIXED"
        )
        if q is not None:
            shape = (len(tree), self._session.vocab_size)
            assert q.shape == shape, f"{name}: probabilities are {list(q.shape)}, not [N, V]"
            for node, children in enumerate(tree.shape.children):
                if children:
                    assert abs(float(q[node].sum()) - 1) < 1e-4, f"{name}: a row does not sum to 1"
                    chances = q[node, tree.tokens[list(children)]]
                    assert bool((chances > 0).all()), f"{name}: a child could not have been drawn from its row"
        return draft
