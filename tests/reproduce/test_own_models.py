"""The reproductions that bring their own models: they go through, resume, and their verdicts follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import tiny_model
from tests.decode.test_any_subset import tiny_xlnet
from tokenworks.core.corpus import train_bpe
from tokenworks.core.cost import CostCurve
from tokenworks.core.models import LoadedModel
from tokenworks.core.session import Session
from tokenworks.decode.any_subset import END as ANY_END
from tokenworks.decode.any_subset import MASK as ANY_MASK
from tokenworks.decode.masked_diffusion import BidirectionalLlama
from tokenworks.decode.ppd_training import TrainedPrompts
from tokenworks.reproduce import Run, assd, freecache_guided_diffusion, ppd
from tokenworks.reproduce.result import CONFIRMED, REFUTED, Result

TEXTS = ["hello world, this is a tokenizer of small words. " * 60]


class Cut(Exception):
    pass


@pytest.fixture(scope="module")
def judge() -> LoadedModel:
    model = tiny_model("llama", vocab_size=290, max_position_embeddings=4096)
    return LoadedModel(model, train_bpe(TEXTS, 290), "tiny", "here")


def through(module: Any, folder: Path) -> Result:
    """A quick run that is cut off before its last piece, and goes on."""
    last: list[int] = []
    module.run(Run(1, True, folder / "whole", lambda done, total, what: last.append(1)))

    calls = 0

    def cut(done: int, total: int, what: str) -> None:
        nonlocal calls
        calls += 1
        if calls == len(last) - 1:
            raise Cut

    with pytest.raises(Cut):
        module.run(Run(1, True, folder, cut))
    (pieces,) = folder.glob("unfinished/*/*/pieces.jsonl")
    assert pieces.read_text().count("\n") > 1
    result: Result = module.run(Run(1, True, folder))
    assert not pieces.exists()
    assert result.verdict
    assert len({tuple(row) for row in result.table}) == 1
    assert all(len(line["x"]) == len(line["y"]) for plot in result.series for line in plot["lines"])
    return result


def test_assd(judge: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_bpe(TEXTS, 280, [ANY_MASK, ANY_END])
    monkeypatch.setattr(assd, "load_any_subset", lambda: (tiny_xlnet(280), tokenizer))
    monkeypatch.setattr(assd, "load", lambda name: judge)
    monkeypatch.setattr(assd, "python_docs", lambda split: TEXTS)
    monkeypatch.setattr(assd, "LENGTH", 16)
    result = through(assd, tmp_path)
    figures = {figure.name: figure for figure in result.figures}
    assert figures["Tokens by network calls, the worst text"].verdict == CONFIRMED
    assert result.traces


def test_unchecked_filling_is_k_tokens_a_pass() -> None:
    model = tiny_xlnet(9)
    filled, passes = assd.unchecked(model, torch.tensor([3, 0, 0, 4, 0, 0, 0]), 2, seed=0)
    assert passes == 3
    assert 0 not in filled
    assert (filled[0], filled[3]) == (3, 4)


def test_chunks_are_masked_at_the_rate() -> None:
    ids, holes = assd.chunk(torch.arange(5000), 3, 0.95)
    assert ids.tolist() == list(range(int(ids[0]), int(ids[0]) + assd.LENGTH))
    assert int(holes.sum()) == round(0.95 * assd.LENGTH)


def test_ppd(judge: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy = torch.tensor([[0.4, 0.2] + [0.01] * 8] * 3)
    embeddings = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(ppd, "load", lambda name: judge)
    monkeypatch.setattr(ppd, "load_prompt_tokens", lambda model: TrainedPrompts(embeddings, accuracy))
    monkeypatch.setattr(ppd, "kept_cost", lambda session: CostCurve((1, 100), (1.0, 2.0)))
    monkeypatch.setattr(
        "tokenworks.decode.ppd_training.kept_cost", lambda session: CostCurve((1, 100), (1.0, 2.0))
    )
    original = ppd.write_text
    monkeypatch.setattr(ppd, "write_text", lambda *args, seed: original(*args, length=24, seed=seed, rows=6))
    result = through(ppd, tmp_path)
    figures = {figure.name: figure for figure in result.figures}
    assert figures["Prompts with the words of plain decoding"].verdict == CONFIRMED


def test_the_guesses_of_the_untrained_and_the_trained_are_told_apart(judge: LoadedModel) -> None:
    """Guesses that are the model's own next words would be right at every place."""
    heads = ppd.MedusaHeads(2, 32)
    trained = TrainedPrompts(torch.randn(2, 32), torch.zeros(2, 10))
    prompt = ppd.prompts(limit=1)[0]
    found = ppd._guesses(judge, trained, heads, prompt, list(range(1, 20)))
    assert found["places"] == 17
    assert set(found) == {"places", *ppd.GUESSERS}
    assert all(0 <= hits <= 17 for name in ppd.GUESSERS for hits in found[name])
    assert ppd._guesses(judge, trained, heads, prompt, [1])["places"] == 0


def test_freecache_and_guided_diffusion(
    judge: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = freecache_guided_diffusion
    tokenizer = train_bpe(TEXTS, 290, ["<mask>", "<end>"], single_digits=True)
    model, guide = (tiny_model("llama", seed=seed, vocab_size=290, max_position_embeddings=512) for seed in (0, 1))
    monkeypatch.setattr(
        module, "load_masked_diffusion", lambda: (BidirectionalLlama(model, 0, shifted=True), guide, tokenizer)
    )
    monkeypatch.setattr(module, "load", lambda name: judge)
    monkeypatch.setattr(module, "python_docs", lambda split: TEXTS)
    for name, number in (("SLOTS", 8), ("LONG", 8), ("PROMPTS", (4, 8))):
        monkeypatch.setattr(module, name, number)
    result = through(module, tmp_path)
    assert len(result.table) == 9


def test_verdicts_on_diffusion_turn_with_what_was_measured() -> None:
    module = freecache_guided_diffusion

    def made(fast: float, right: float) -> tuple[list[Any], dict[int, list[Any]]]:
        names = [module.PLAIN, module.QUARTER, module.BLOCKS, *module.FROZEN, *module.GUIDED, module.BOTH]
        piece = {
            name: {
                "token_ids": [1], "steps": 8, "fed": 9, "guide": 1, "nats": 1.0,
                "seconds": 1 / fast if name == module.BOTH else 1.0,
                "right": right if name in (module.BOTH, "guided") else 0.9,
            }
            for name in names
        }  # fmt: skip
        return [piece] * 5, {length: [piece] * 5 for length in module.PROMPTS}

    good, bad = module._figures(*made(5, 0.95)), module._figures(*made(0.5, 0.2))
    assert [figure.verdict for figure in good[:3]] == [CONFIRMED] * 3
    assert [figure.verdict for figure in bad[:3]] == [REFUTED] * 3


def test_the_judge_reads_new_text_behind_the_old(judge: LoadedModel) -> None:
    session = Session(judge.model)
    found = freecache_guided_diffusion.nats_after(session, judge.tokenizer, "hello", " world")
    ids = judge.tokenizer("hello world")["input_ids"]
    known = len(judge.tokenizer("hello")["input_ids"])
    with torch.no_grad():
        rows: Tensor = torch.log_softmax(judge.model(torch.tensor([ids])).logits[0], -1)
    expected = -np.mean([float(rows[i - 1, ids[i]]) for i in range(known, len(ids))]) * (len(ids) - known) / 6
    assert found == pytest.approx(expected, abs=1e-4)
