"""Token Recycling (Luo et al., "Turning Trash into Treasure", arXiv 2408.08696, ACL 2025).

Every forward pass yields, for every slot it ran, a ranking of the tokens that could follow. Plain decoding throws
all of it away but one token. Here the k best of each slot are kept in an adjacency matrix M [V, k]: row t holds
the k candidates last seen after token t. A draft is a tree read off M from the last confirmed token, along a fixed
template: node (i0, i1, ...) is candidate i0 of the root token, then candidate i1 of that token, and so on. One
pass verifies the tree, and its logits, rejected slots included, refill M.

Nothing is trained, no second model is needed, and the text is the target's own: M only decides how many passes it
takes. M outlives a generation ("hot start"); `reset` gives the paper's "cold start".
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from tokenworks.core.cost import CostCurve, kept_cost
from tokenworks.core.errors import InputError
from tokenworks.core.files import atomic_write
from tokenworks.core.sampling import Sampling, top_ids
from tokenworks.core.session import Reader, Session
from tokenworks.core.tree import TokenTree, TreeShape
from tokenworks.decode.contract import Draft, Law, Verdict
from tokenworks.decode.speculative import SpeculativeDecoder

RankPath = tuple[int, ...]

# The published template "2.2.2": for each node that has children, how many (nodes by rank path; the root is ()).
# 80 nodes, by level 8, 21, 25, 15, 8, 3.
_CHILDREN: dict[RankPath, int] = {
    (): 8,
    **{(0,): 8, (1,): 4, (2,): 3, (3,): 2, (4,): 1, (5,): 1, (6,): 1, (7,): 1},
    **{(0, 0): 8, (0, 1): 3, (0, 2): 2, (0, 3): 1, (0, 4): 1, (0, 5): 1, (0, 6): 1, (0, 7): 1},
    **{(1, 0): 2, (1, 1): 1, (2, 0): 1, (3, 0): 1, (4, 0): 1, (5, 0): 1},
    **{(0, 0, 0): 5, (0, 0, 1): 2, (0, 0, 2): 1, (0, 0, 3): 1, (0, 0, 4): 1, (0, 1, 0): 1, (0, 2, 0): 1},
    **{(1, 0, 0): 1, (2, 0, 0): 1, (3, 0, 0): 1},
    **{(0, 0, 0, 0): 3, (0, 0, 0, 1): 1, (0, 0, 0, 2): 1, (0, 0, 1, 0): 1, (0, 1, 0, 0): 1, (1, 0, 0, 0): 1},
    **{(0, 0, 0, 0, 0): 2, (0, 0, 0, 1, 0): 1},
}
PUBLISHED_TREE: tuple[RankPath, ...] = tuple(
    sorted(((*p, i) for p, n in _CHILDREN.items() for i in range(n)), key=lambda path: (len(path), path))
)
"""The paper's static template, chosen once by its authors on a small development set for all models."""

SIZES = (2, 3, 5, 8, 11, 14, 17, 23, 29, 47, 80)
"""Sizes of tree to choose among; 5, 11, 17, ... with their root fill passes of 6, 12, 18, ... slots."""


class TokenRecycling:
    """The drafter: an adjacency matrix and a tree template.

    Args:
        vocab_size: V, the width of the model's logits (`session.vocab_size`).
        tree: rank paths, every prefix of a path among them; the published template by default. An empty tree is
            plain decoding.
        k: candidates kept for a token; the paper's 8.
        seed_from_prompt: also fill the rows of the prompt's tokens from the prompt's own pass. Not in the paper;
            it costs the prompt's logits, about one pass, and saves several.

    Attributes:
        matrix: int32 [V, k], the candidates after each token, likeliest first; zeros at first. 1.57 MB for a
            vocabulary of 49,152.

    Raises:
        InputError: k larger than the vocabulary or below 1, or a tree that is malformed or needs ranks above k.
    """

    name = "token-recycling"
    law = Law.FIXED

    def __init__(
        self,
        vocab_size: int,
        tree: Iterable[Sequence[int]] = PUBLISHED_TREE,
        k: int = 8,
        seed_from_prompt: bool = False,
    ) -> None:
        if not 1 <= k <= vocab_size:
            raise InputError(f"k: {k} is not between 1 and the vocabulary's {vocab_size}")
        self.template = _Template.of(tuple(sorted(map(tuple, tree), key=lambda path: (len(path), path))))
        if self.template.paths and max(map(max, self.template.paths)) >= k:
            raise InputError(
                f"tree: it uses rank {max(map(max, self.template.paths))}, but k is {k} (ranks 0 to {k - 1})"
            )
        self.k, self.seed_from_prompt = k, seed_from_prompt
        self.matrix = torch.zeros(vocab_size, k, dtype=torch.int32)

    def reset(self) -> None:
        """Forget everything: the next generation starts cold."""
        self.matrix.zero_()

    def start(self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator | None) -> Reader | None:
        """What earlier prompts taught stays in the matrix; this one's logits seed it if that is asked for."""
        return self._learn if self.seed_from_prompt else None

    def propose(self, context: Sequence[int], room: int) -> Draft:
        """The template filled from the matrix, one gather a level; no model call."""
        template = self.template.cut(room)
        tokens = torch.empty(len(template.shape), dtype=torch.long)
        tokens[0] = context[-1]
        for nodes, parents, ranks in template.levels:
            tokens[nodes] = self.matrix[tokens[parents], ranks].long()
        return Draft(TokenTree(tokens, template.shape))

    def observe(self, draft: Draft, logits: Tensor, verdict: Verdict) -> None:
        """M[x_n] = top-k of the logits at n, for every slot n, accepted or not.

        A token may sit on several slots. The accepted path wins, since its context is the text's own; then the
        last slot in breadth-first order. (The paper leaves this open, and on a GPU it is undefined.)
        """
        order = torch.tensor([*range(len(draft.tree)), *verdict.path])
        self._learn(draft.tree.tokens[order], logits, order)

    def _learn(self, tokens: Tensor, logits: Tensor, slots: Tensor | None = None) -> None:
        """Row `tokens[i]` becomes the top k of `logits[slots[i]]`, or `logits[i]`; the last of equals wins."""
        last = {token: place for place, token in enumerate(tokens.tolist())}
        places = torch.tensor(list(last.values()))
        best = top_ids(logits, self.k).to("cpu", torch.int32)
        self.matrix[list(last)] = best[places if slots is None else slots[places]]

    def save(self, path: str | Path) -> None:
        """Write the matrix as safetensors, atomically."""
        with atomic_write(Path(path), "wb") as out:
            out.write(save({"matrix": self.matrix}))

    def load(self, path: str | Path) -> None:
        """Read a matrix that `save` wrote, for a hot start.

        Raises:
            InputError: the file is not there, is not such a file, or belongs to another vocabulary or k.
        """
        try:
            matrix = load_file(path)["matrix"]
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"path: {path} is not a saved recycling matrix ({error})") from error
        if matrix.shape != self.matrix.shape or matrix.min() < 0 or matrix.max() >= len(matrix):
            raise InputError(
                f"path: {path} holds a matrix {list(matrix.shape)}, but this model needs {list(self.matrix.shape)}"
            )
        self.matrix = matrix.to(torch.int32)


class _Template:
    """A set of rank paths, and the gathers that fill it level by level."""

    def __init__(self, paths: tuple[RankPath, ...]) -> None:
        self.paths = paths
        self.shape = TreeShape.from_paths(paths)
        self.levels: list[tuple[Tensor, Tensor, Tensor]] = []
        parents = torch.tensor(self.shape.parents)
        for depth in range(1, max(map(len, paths), default=0) + 1):
            nodes = (self.shape.depths == depth).nonzero().flatten()
            ranks = torch.tensor([path[-1] for path in paths if len(path) == depth])
            self.levels.append((nodes, parents[nodes], ranks))

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, paths: tuple[RankPath, ...]) -> _Template:
        return cls(paths)

    def cut(self, depth: int) -> _Template:
        """The template without the levels below `depth`."""
        if depth >= len(self.levels):
            return self
        return self.of(tuple(path for path in self.paths if len(path) <= depth))


def fit_tree(yields: Iterable[tuple[Sequence[RankPath], float]], cost: CostCurve) -> list[RankPath]:
    """The tree that decodes fastest on this machine: most tokens a pass for what a pass of its width costs.

    Args:
        yields: trees, each with the tokens that a pass over it confirms on average (`measure_yields`).
        cost: seconds of a pass against its width.
    """
    plain: tuple[Sequence[RankPath], float] = ((), 1.0)
    return list(max([plain, *yields], key=lambda found: found[1] / cost(len(found[0]) + 1))[0])


def measure_yields(
    session: Session,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    stop_ids: Iterable[int] = (),
    sizes: Sequence[int] = SIZES,
) -> list[tuple[list[RankPath], float]]:
    """The published tree's likeliest nodes, in trees of several sizes, and what a pass over each confirms.

    How often a node of the published tree is accepted ranks the nodes. A child is never accepted more often than
    its parent, so the first n of them are the best tree of n nodes. What that tree confirms must be measured with
    the tree itself: it also refills fewer rows of the matrix than the published one.

    Decodes greedily, the matrix cold at first, seeded from each prompt and kept from one to the next.

    Args:
        prompts: token ids; of the kind the decoder will meet, but not those it will be judged on.
        sizes: nodes of the trees to measure.

    Raises:
        InputError: the model ends every prompt at once, so that nothing can be measured.
    """
    stops = list(stop_ids)
    _, hits = _decode_all(session, PUBLISHED_TREE, prompts, max_new_tokens, stops)
    ranked = sorted(PUBLISHED_TREE, key=lambda path: (-hits[path], len(path), path))
    trees = [ranked[:size] for size in sizes]
    return [(tree, _decode_all(session, tree, prompts, max_new_tokens, stops)[0]) for tree in trees]


def _decode_all(
    session: Session, tree: Sequence[RankPath], prompts: Iterable[Sequence[int]], limit: int, stops: list[int]
) -> tuple[float, Counter[RankPath]]:
    """Tokens confirmed a pass, and how often each node was accepted."""
    decoder = SpeculativeDecoder(session, TokenRecycling(session.vocab_size, tree, seed_from_prompt=True))
    accepted: list[int] = []
    hits: Counter[RankPath] = Counter()
    for prompt in prompts:
        generation = decoder.generate(prompt, limit, stops)
        accepted += generation.accepted
        path: RankPath = ()
        for step in generation.steps:
            path = () if step.rank is None else (*path, step.rank)
            if path:
                hits[path] += 1
    if not accepted:
        raise InputError("prompts: no decoding pass was made; give prompts that the model continues")
    return sum(accepted) / len(accepted), hits


def machine_tree(session: Session) -> list[RankPath]:
    """The tree for this model's cost curve on this machine and the yields that come with tokenworks.

    Those were measured with SmolLM2-135M on the calibration prompts (`benchmarks/tree_yields.py`). For another
    kind of text or model: `fit_tree(measure_yields(session, prompts), kept_cost(session))`.
    """
    kept = json.loads(files("tokenworks.decode").joinpath("token_recycling.json").read_text())
    ranked = [tuple(path) for path in kept["nodes"]]
    return fit_tree([(ranked[:size], found) for size, found in kept["yields"]], kept_cost(session))
