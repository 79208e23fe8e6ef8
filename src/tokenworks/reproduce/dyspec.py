"""DySpec (arXiv 2410.11744): is a tree grown where the draft is sure better than a fixed tree of equal size?

The paper's premise is that the draft's probability of a token tells how likely its acceptance is; its claim,
that growing the tree by that estimate confirms more tokens than fixed trees of the same size, those of
SpecInfer and Sequoia among them. Its speeds of up to 9.4 times plain decoding rest on a target that is read
from main memory, for which trees of any size are free; they are not to be had here.

Five trees of equal size, all drawn without replacement and verified by recursive rejection, at three temperatures:

    k-ary       every node has two children, level after level, cut at the size
    static      the best fixed tree for acceptance rates by rank, measured on calibration prompts (Sequoia's way)
    RSD-S       stochastic beams
    DySpec      greedy expansion
    threshold   its variant by level; its threshold is the one whose trees came closest to the size on calibration
                prompts

A second measurement asks the verifier, for every child that it tested, how likely it was to accept.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import spearmanr

from tokenworks.core.data import Prompt, prompts
from tokenworks.core.measure import Interval, bootstrap
from tokenworks.core.models import LoadedModel, load
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Session
from tokenworks.core.text import encode_prompt, stop_ids
from tokenworks.core.tree import TreeShape
from tokenworks.decode.contract import Draft, Law, Verdict
from tokenworks.decode.distil import load_draft
from tokenworks.decode.draft_model import DraftModel, DraftTree, ModelDrafter
from tokenworks.decode.dyspec import DynamicTree, nonzero_blocks, reorder
from tokenworks.decode.rsd import ConstantBranching, RecursiveRejection, StochasticBeam, gumbel_top_k, without
from tokenworks.decode.speculative import SpeculativeDecoder
from tokenworks.decode.speculative_sampling import residual
from tokenworks.reproduce import Run
from tokenworks.reproduce.drafting import Comparison, compare
from tokenworks.reproduce.ledger import Ledger
from tokenworks.reproduce.result import Figure, Result, exact, figure, line

MODEL = "smollm2-135m"
SIZES, TEMPERATURES = (8, 16), (0.0, 0.6, 1.0)
DEPTH = 5
THRESHOLDS = (0.04, 0.08, 0.16, 0.24, 0.32, 0.4, 0.5, 0.65, 0.8)
STATIC, DYNAMIC = ("k-ary", "static", "RSD-S"), ("DySpec", "threshold")
RANKS = 8
BLOCK, LARGE = 16, 64
"""Side of a block of the attention mask, and size of the trees whose blocks are counted."""


class StaticTree(ModelDrafter):
    """A fixed tree of ranks: a node has as many children, drawn without replacement, as it has in the tree."""

    name = "static"
    law = Law.WITHOUT_REPLACEMENT

    def __init__(self, model: DraftModel, paths: Sequence[tuple[int, ...]]) -> None:
        super().__init__(model)
        self.shape = TreeShape.from_paths(paths)

    def grow(self, tree: DraftTree, room: int) -> Draft:
        level = [(0, 0)]  # nodes of the tree with their places in the shape
        for _ in range(room):
            inner = [(node, place) for node, place in level if self.shape.children[place]]
            if not inner:
                break
            if level != [(0, 0)]:
                tree.run([node for node, _ in inner])
            level = []
            for node, place in inner:
                places = self.shape.children[place]
                chosen, values = gumbel_top_k(tree.distributions[node].log(), len(places), self.model.generator)
                drawn = chosen[values > -torch.inf].tolist()
                level += [(tree.add(node, index), below) for index, below in zip(drawn, places, strict=False)]
        return tree.finish()


def best_static(rates: Sequence[float], size: int, depth: int) -> list[tuple[int, ...]]:
    """The `size` paths of the largest product of acceptance rates by rank, at most `depth` long."""
    paths: list[tuple[int, ...]] = []
    # A later rank may have been accepted more often by chance; it comes after its elder siblings all the same.
    falling = np.minimum.accumulate(rates).tolist()
    heap: list[tuple[float, tuple[int, ...]]] = [(-rate, (rank,)) for rank, rate in enumerate(falling)]
    heapq.heapify(heap)
    while heap and len(paths) < size:
        value, path = heapq.heappop(heap)
        paths.append(path)
        if len(path) < depth:
            for rank, rate in enumerate(falling):
                heapq.heappush(heap, (value * rate, (*path, rank)))
    return paths


class Recorder(RecursiveRejection):
    """Recursive rejection that keeps, for every child it tested, the draft's share R and the acceptance."""

    def __init__(self) -> None:
        super().__init__()
        self.tested: list[tuple[float, float]] = []
        self.by_rank = np.zeros((RANKS, 2))
        """For each rank how often it was tested, and accepted."""
        self.sizes: list[int] = []

    def verify(
        self, draft: Draft, logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | None
    ) -> Verdict:
        verdict = super().verify(draft, logits, sampling, generator)
        self.sizes.append(len(draft.tree) - 1)
        for node, child in itertools.pairwise([*verdict.path, None]):
            assert node is not None
            self._note(draft, node, child, sampling.distribution(logits[node]).double())
        return verdict

    def _note(self, draft: Draft, node: int, taken: int | None, q: torch.Tensor) -> None:
        drawn = draft.drawn(node)
        if not drawn:
            return
        assert draft.probabilities is not None
        p = draft.probabilities[node].double()
        for rank, child in enumerate(drawn):
            x = int(draft.tree.tokens[child])
            self.tested.append((float(p[x]), min(1.0, float(q[x] / p[x]))))
            if rank < RANKS:
                self.by_rank[rank] += 1, child == taken
            if child == taken:
                return
            q, p = residual(q, p), without(p, x)


def run(settings: Run) -> Result:
    """Measure, in about nine minutes a seed on two CPU cores; `quick` takes two."""
    begun = time.perf_counter()
    count, new_tokens = (2, 8) if settings.quick else (6, 32)
    loaded = load(MODEL)
    session = Session(loaded.model)
    draft = load_draft(loaded.model, session.vocab_size)
    chosen, lessons = prompts(split="test", limit=count), prompts(split="calibration", limit=4)
    facts = {
        "prompts": [p.id for p in chosen],
        "fitted_on": [p.id for p in lessons],
        "max_new_tokens": new_tokens,
        "sizes": SIZES,
        "depth": DEPTH,
    }
    ledger = Ledger(settings.folder / "unfinished" / "dyspec", {**facts, "torch": torch.__version__})

    def trial(key: str, drafter: ModelDrafter, heat: float) -> Recorder:
        """What a drafter's trees were like on the calibration prompts."""
        settings.progress(0, len(chosen), f"fitting, {key}")
        recorder = Recorder()

        def work() -> Any:
            _decode_all(
                loaded, SpeculativeDecoder(session, drafter, recorder, Sampling(heat)), lessons, new_tokens
            )
            return {"tested": recorder.tested, "by_rank": recorder.by_rank.tolist(), "sizes": recorder.sizes}

        kept = ledger.once(f"trial/{key}", work)
        recorder.tested, recorder.sizes = kept["tested"], kept["sizes"]
        recorder.by_rank = np.array(kept["by_rank"])
        return recorder

    decoders = {"plain": SpeculativeDecoder(session, sampling=Sampling(1.0))}
    fitted: dict[str, Any] = {}
    for heat in TEMPERATURES:
        flat = trial(f"flat, T={heat}", ConstantBranching(draft, (RANKS,)), heat).by_rank
        rates = flat[:, 1] / flat[0, 0]  # of all passes, those that accepted this rank
        sizes = {
            tau: float(np.mean(trial(f"threshold {tau}, T={heat}", _threshold(draft, tau), heat).sizes))
            for tau in THRESHOLDS
        }
        for size in SIZES:
            tau = min(sizes, key=lambda t: abs(sizes[t] - size))
            paths = best_static(rates.tolist(), size, DEPTH)
            fitted[f"N={size}, T={heat}"] = {"threshold": tau, "mean size": sizes[tau], "static": paths}
            for name, drafter in _drafters(draft, size, paths, tau).items():
                decoders[f"{name}, N={size}, T={heat}"] = SpeculativeDecoder(
                    session, drafter, RecursiveRejection(), Sampling(heat)
                )
    found = compare(settings, loaded, decoders, chosen, new_tokens, ledger)

    tested: dict[str, list[tuple[float, float]]] = {}
    for prompt in chosen:
        settings.progress(len(tested), count, f"tested children, {prompt.id}")
        tested[prompt.id] = ledger.once(f"tested/{prompt.id}", _tested(loaded, session, draft, prompt, new_tokens))
    blocks = ledger.once("blocks", lambda: _blocks(loaded, session, draft, chosen[0]))
    result = Result(
        slug="dyspec",
        claim="",
        figures=_figures(found, list(tested.values())),
        seeds=list(range(settings.seeds)),
        seconds=time.perf_counter() - begun,
        model=MODEL,
        settings={**facts, "fitted": fitted, "batch": 1, "dtype": str(loaded.model.dtype)},
        table=found.rows("plain"),
        series=_series(found, list(tested.values())),
        notes=[
            f"Blocks of {BLOCK} x {BLOCK} that the attention of a tree of {LARGE} nodes touches, by the order of "
            + f"its nodes: {blocks}. No block is skipped by the dense attention used here.",
        ],
    )
    ledger.close()
    return result


def _threshold(draft: DraftModel, tau: float) -> DynamicTree:
    return DynamicTree(draft, 4 * max(SIZES), DEPTH, threshold=tau)


def _drafters(
    draft: DraftModel, size: int, paths: Sequence[tuple[int, ...]], tau: float
) -> dict[str, ModelDrafter]:
    binary = [path for length in range(1, DEPTH) for path in itertools.product((0, 1), repeat=length)]
    return {
        "k-ary": StaticTree(draft, binary[:size]),
        "static": StaticTree(draft, paths),
        "RSD-S": StochasticBeam(draft, 4, size // 4),
        "DySpec": DynamicTree(draft, size, DEPTH),
        "threshold": _threshold(draft, tau),
    }


def _decode_all(
    loaded: LoadedModel, decode: SpeculativeDecoder, chosen: Sequence[Prompt], new_tokens: int
) -> None:
    stops = stop_ids(loaded.model, loaded.tokenizer)
    for prompt in chosen:
        decode.generate(encode_prompt(loaded.tokenizer, prompt.text), new_tokens, stops, seed=0)


def _tested(
    loaded: LoadedModel, session: Session, draft: DraftModel, prompt: Prompt, new_tokens: int
) -> Callable[[], list[tuple[float, float]]]:
    def work() -> list[tuple[float, float]]:
        recorder = Recorder()
        drafter = DynamicTree(draft, max(SIZES), DEPTH)
        _decode_all(loaded, SpeculativeDecoder(session, drafter, recorder, Sampling(1.0)), [prompt], new_tokens)
        return recorder.tested

    return work


def _blocks(loaded: LoadedModel, session: Session, draft: DraftModel, prompt: Prompt) -> dict[str, int]:
    drafter, ids = DynamicTree(draft, LARGE, 12), encode_prompt(loaded.tokenizer, prompt.text)
    drafter.start(ids, Sampling(1.0), torch.Generator().manual_seed(0))
    shape = drafter.propose(ids, 12).tree.shape
    found = {"as grown": nonzero_blocks(shape.ancestors, BLOCK)}
    orders: tuple[Literal["depth"], Literal["heavy path"]] = ("depth", "heavy path")
    for by in orders:
        order = reorder(shape, by)
        found[by] = nonzero_blocks(shape.ancestors[order][:, order], BLOCK)
    return found


def correlation(tested: Sequence[Sequence[tuple[float, float]]]) -> Interval:
    """Spearman's between the draft's share and the acceptance, over all tested children; interval over prompts."""

    def over(items: np.ndarray) -> float:
        pairs = np.concatenate([np.array(tested[item]) for item in items])
        return float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic)

    return bootstrap(over, len(tested), draws=400)


def _figures(found: Comparison, tested: list[list[tuple[float, float]]]) -> list[Figure]:
    premise = correlation(tested)
    cells = [f"N={size}, T={heat}" for size in SIZES for heat in TEMPERATURES]

    def efficiency(name: str, cell: str) -> float:
        return found.efficiency(f"{name}, {cell}").value

    best = {cell: max(STATIC, key=lambda name: efficiency(name, cell)) for cell in cells}
    wins = sum(efficiency("DySpec", cell) > efficiency(best[cell], cell) for cell in cells) / len(cells)
    gain = _mean_gain(found, [(f"DySpec, {cell}", f"{best[cell]}, {cell}") for cell in cells])
    variant = _mean_gain(found, [(f"threshold, {cell}", f"DySpec, {cell}") for cell in cells])

    def mean(name: Callable[[str], str]) -> float:
        return sum(efficiency(name(cell), cell) for cell in cells) / len(cells)

    # Thresholds are the dossier's, fixed before anything was run.
    return [
        figure("Spearman's correlation of draft probability and acceptance", "coefficient", premise, 0.5, 0.0,
               ours=premise.value, paper="strong", headline=True),
        figure("Block efficiency against the best fixed tree of equal size", "ratio", gain, 1.05, 1.0,
               ours=mean(lambda cell: "DySpec"), baseline=mean(lambda cell: best[cell]),
               baseline_name="the best of k-ary, static and RSD-S in each cell", headline=True),
        figure("Sizes and temperatures at which it is ahead", "share", exact(wins), 0.51, 0.5,
               ours=wins, baseline=0.5, baseline_name="half", headline=True),
        figure("The threshold variant against greedy expansion", "ratio", variant, 0.95, 0.9,
               ours=mean(lambda cell: "threshold"), baseline=mean(lambda cell: "DySpec"),
               baseline_name="greedy expansion"),
        *(figure(f"Block efficiency against {name}, N=16, T=1.0", "ratio",
                 found.gain("DySpec, N=16, T=1.0", f"{name}, N=16, T=1.0"), 1.0, 1.0,
                 ours=efficiency("DySpec", "N=16, T=1.0"), baseline=efficiency(name, "N=16, T=1.0"),
                 baseline_name=name) for name in STATIC),
    ]  # fmt: skip


def _mean_gain(found: Comparison, pairs: Sequence[tuple[str, str]]) -> Interval:
    """Geometric mean over cells of the ratio of block efficiencies; every resample takes the same prompts."""
    names = {name for pair in pairs for name in pair}
    counts = {
        name: (np.array(found.per_prompt(name, "tokens")), np.array(found.per_prompt(name, "passes")))
        for name in names
    }

    def over(items: np.ndarray) -> float:
        efficiency = {name: tokens[items].sum() / passes[items].sum() for name, (tokens, passes) in counts.items()}
        return float(np.exp(np.mean([np.log(efficiency[a] / efficiency[b]) for a, b in pairs])))

    return bootstrap(over, len(next(iter(counts.values()))[0]))


def _series(found: Comparison, tested: list[list[tuple[float, float]]]) -> list[dict[str, Any]]:
    pairs = np.concatenate([np.array(part) for part in tested])
    edges = np.quantile(pairs[:, 0], np.linspace(0, 1, 11))
    bins = np.clip(np.searchsorted(edges, pairs[:, 0], side="right") - 1, 0, 9)
    filled = [b for b in range(10) if (bins == b).any()]
    lines = []
    for name in (*STATIC, *DYNAMIC):
        at = [found.efficiency(f"{name}, N={max(SIZES)}, T={heat}") for heat in TEMPERATURES]
        lines.append(line(name, TEMPERATURES, at))
    return [
        {
            "title": "The premise: draft probability and acceptance, in ten equal parts",
            "x_label": "the draft's probability of the child, among what is left",
            "y_label": "probability that it is accepted",
            "lines": [
                {
                    "name": "tested children",
                    "x": [float(pairs[bins == b, 0].mean()) for b in filled],
                    "y": [float(pairs[bins == b, 1].mean()) for b in filled],
                },
                {"name": "acceptance = probability", "x": [0.0, 1.0], "y": [0.0, 1.0]},
            ],
        },
        {
            "title": f"Tokens a pass with trees of {max(SIZES)} nodes",
            "x_label": "temperature",
            "y_label": "block efficiency",
            "lines": lines,
        },
    ]
