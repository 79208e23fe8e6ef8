"""The reproductions of draft-and-verify papers: figures follow from counts; fixed trees are exact and the best."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import tiny_model
from tokenworks.core.corpus import train_bpe
from tokenworks.core.measure import goodness_of_fit
from tokenworks.core.models import LoadedModel
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Session
from tokenworks.decode.draft_model import DraftModel
from tokenworks.decode.rsd import RecursiveRejection
from tokenworks.decode.spectr import acceptance
from tokenworks.decode.speculative import SpeculativeDecoder
from tokenworks.reproduce import Run, dyspec, rsd, spectr
from tokenworks.reproduce.drafting import Comparison, compare
from tokenworks.reproduce.ledger import Ledger
from tokenworks.reproduce.result import CONFIRMED, REFUTED
from tokenworks.testing import ToyTarget


def counted(tokens: float, passes: float, seconds: float = 1.0, ids: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    counts = {"tokens": tokens, "passes": passes, "nats": 20.0, "words": 10, "seconds": seconds}
    return {"token_ids": list(ids), "counts": counts}


def test_what_is_compared_follows_from_the_counts() -> None:
    found = Comparison()
    for prompt in ("a", "b"):
        for _ in range(2):  # seeds
            found.add("plain", prompt, counted(10, 10, 2.0))
            found.add("ours", prompt, counted(15, 10, 1.0, (1, 2) if prompt == "a" else (3,)))
    assert found.efficiency("ours").value == 1.5
    assert found.gain("ours", "plain").value == 1.5
    assert found.speed("ours", "plain").value == 2
    assert found.tokens_per_second("ours") == 10
    assert found.nats("ours").value == 2
    assert found.likelier("ours", "plain").value == 1
    assert found.same_text("ours", "plain") == 0.5
    rows = found.rows("plain")
    assert [row["times plain"] for row in rows] == [1, 2]


def test_a_fixed_tree_is_exact() -> None:
    drafter = dyspec.StaticTree(DraftModel(ToyTarget(3, 5), 3), [(0,), (1,), (0, 0), (0, 1), (1, 0)])
    decode = SpeculativeDecoder(ToyTarget(3), drafter, dyspec.Recorder(), Sampling(1.0))
    torch.manual_seed(0)
    counts = Counter(tuple(decode.generate([0], 4).token_ids[:3]) for _ in range(700))
    exact = ToyTarget(3).string_probabilities(0, 3, Sampling(1.0))
    test = goodness_of_fit([counts[s] for s in exact], list(exact.values()), effect=0.15)
    assert test.passed, str(test)
    assert test.power > 0.95


def test_no_fixed_tree_of_the_size_is_better() -> None:
    rates, depth = (0.5, 0.25, 0.1), 3
    nodes = [path for length in range(1, depth + 1) for path in itertools.product(range(3), repeat=length)]

    def value(paths: list[tuple[int, ...]]) -> float:
        return sum(float(np.prod([rates[rank] for rank in path])) for path in paths)

    for size in (1, 2, 4, 7):
        found = dyspec.best_static(rates, size, depth)
        assert len(found) == size
        assert value(found) == pytest.approx(sum(sorted((value([node]) for node in nodes), reverse=True)[:size]))
        assert all(path[:-1] in found or len(path) == 1 for path in found)
        assert all((*path[:-1], rank) in found for path in found for rank in range(path[-1]))
    uneven = dyspec.best_static((0.2, 0.1, 0.4), 3, 1)
    assert sorted(uneven) == [(0,), (1,), (2,)]


def test_what_the_verifier_tested_is_what_it_accepts() -> None:
    recorder = dyspec.Recorder()
    drafter = dyspec.StaticTree(DraftModel(ToyTarget(4, 5), 4), [(0,), (1,), (2,)])
    decode = SpeculativeDecoder(ToyTarget(4), drafter, recorder, Sampling(1.0))
    torch.manual_seed(0)
    accepted = [len(decode.generate([0], 3).accepted) for _ in range(300)]
    assert accepted
    tests, taken = recorder.by_rank[:3].T
    assert (np.diff(tests) <= 0).all(), "a later child is tested only if its elders were refused"
    assert all(0 < share <= 1 and 0 <= chance <= 1 for share, chance in recorder.tested)
    assert len(recorder.tested) == tests.sum()
    # The chances that were recorded are those with which children were in fact taken.
    assert sum(chance for _, chance in recorder.tested) == pytest.approx(taken.sum(), rel=0.1)


def test_the_correlation_is_spearmans() -> None:
    rising = [[(x, x**2) for x in (0.1, 0.2, 0.5, 0.9)]] * 3
    assert dyspec.correlation(rising).value == pytest.approx(1)
    falling = [[(x, 1 - x) for x in (0.1, 0.2, 0.5, 0.9)]] * 3
    assert dyspec.correlation(falling).value == pytest.approx(-1)


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    texts = ["hello world, this is a tokenizer of small words"] * 9
    return LoadedModel(
        tiny_model("llama", vocab_size=290, max_position_embeddings=4096), train_bpe(texts, 290), "tiny", "here"
    )


def small(module: ModuleType, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a reproduction measure a tiny model, drafted for by another."""
    helper = tiny_model("llama", vocab_size=290, seed=1, num_hidden_layers=1, max_position_embeddings=4096)
    monkeypatch.setattr(module, "load", lambda name: loaded)
    monkeypatch.setattr(module, "load_draft", lambda model, size: DraftModel(Session(helper), size))


@pytest.mark.parametrize("module", [spectr, rsd, dyspec])
def test_a_run_goes_through_and_resumes(
    module: ModuleType, tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(module, tiny, monkeypatch)
    monkeypatch.setattr(module, "TEMPERATURES", (1.0,), raising=False)

    class Cut(Exception):
        pass

    def cut(done: int, total: int, what: str) -> None:
        if done == total - 1:
            raise Cut

    with pytest.raises(Cut):
        module.run(Run(1, True, tmp_path, cut))
    (pieces,) = tmp_path.glob("unfinished/*/*/pieces.jsonl")
    before = len(pieces.read_text().splitlines())
    seen: list[str] = []
    monkeypatch.setattr(SpeculativeDecoder, "generate", _watched(SpeculativeDecoder.generate, seen))
    result = module.run(Run(1, True, tmp_path))
    assert before > 3
    assert len(seen) < before, "what was measured before is not measured again"
    assert not pieces.exists()
    assert result.verdict
    assert result.table
    assert len({tuple(row) for row in result.table}) == 1, "all rows have the same columns"
    assert all(len(line["x"]) == len(line["y"]) for plot in result.series for line in plot["lines"])


def _watched(generate: Any, seen: list[str]) -> Any:
    def watched(self: SpeculativeDecoder, *args: Any, **options: Any) -> Any:
        seen.append(self.drafter.name)
        return generate(self, *args, **options)

    return watched


def test_pairs_are_the_distributions_at_each_place(tiny: LoadedModel) -> None:
    helper = tiny_model("llama", vocab_size=290, seed=1, num_hidden_layers=1)
    session, draft = Session(tiny.model), DraftModel(Session(helper), 290)
    found = list(spectr.pairs(session, draft, [1, 2, 3], [4, 5]))
    assert len(found) == 2
    with torch.no_grad():
        for place, (p, q) in enumerate(found):
            ids = torch.tensor([[1, 2, 3, 4, 5][: 3 + place]])
            assert torch.allclose(p.float(), torch.softmax(helper(ids).logits[0, -1], -1), atol=1e-5)
            assert torch.allclose(q.float(), torch.softmax(tiny.model(ids).logits[0, -1], -1), atol=1e-5)
            assert 0 < acceptance(p, q, 2) <= 1


def test_verdicts_turn_with_the_counts(tiny: LoadedModel) -> None:
    def made(ours: float) -> Comparison:
        found = Comparison()
        names = ["plain", *(f"SpecTr {k}x3" for k in spectr.DRAFTS), "SpecInfer 8x3"]
        for name, prompt in itertools.product(names, ("a", "b", "c")):
            found.add(name, prompt, counted(10 * ours if name == "SpecTr 8x3" else 10, 10))
        return found

    shares = [{"places": 2, "sums": {str(k): [1.0, 1.05] for k in spectr.CANDIDATES}}] * 3
    better, worse = (spectr._figures(made(gain), shares) for gain in (1.3, 0.8))
    assert better[0].verdict == better[1].verdict == CONFIRMED
    assert worse[0].verdict == REFUTED


def test_comparisons_run_each_decoder_on_each_prompt_once(tiny: LoadedModel, tmp_path: Path) -> None:
    from tokenworks.core.data import prompts

    session = Session(tiny.model)
    helper = DraftModel(Session(tiny.model), 290)
    decoders = {
        "plain": SpeculativeDecoder(session),
        "same model": SpeculativeDecoder(session, rsd.StochasticBeam(helper, 2, 2), RecursiveRejection()),
    }
    found = compare(Run(2, True, tmp_path), tiny, decoders, prompts(limit=2), 6, Ledger(tmp_path, {}))
    assert found.same_text("same model", "plain") == 1
    assert found.per_prompt("plain", "tokens") == [10, 10]  # two seeds of five passes after the prompt's
    assert found.gain("same model", "plain").value > 1.5
