"""The grid of decoders, and its plot."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tokenworks.core.errors import InputError
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Session
from tokenworks.decode.draft_model import DraftModel
from tokenworks.decode.grid import lossless_pairs, measure_grid
from tokenworks.report.bars import save_grid

DRAFTERS = ("autoregressive", "draft-chain", "rsd-c")


def test_the_grid_holds_every_lossless_pair(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    session = Session(tiny_llama)
    draft = DraftModel(Session(tiny_llama), session.vocab_size)
    decoders = lossless_pairs(session, draft, Sampling(), DRAFTERS)
    assert set(decoders) == {
        ("autoregressive", "token-matching"),
        *(("draft-chain", v) for v in ("token-matching", "speculative-sampling", "k-seq", "recursive-rejection")),
        ("draft-chain", "multi-step"),
        *(("rsd-c", v) for v in ("token-matching", "recursive-rejection")),
    }
    done: list[int] = []
    rows = measure_grid(decoders, [[1, 2, 3], [4, 5]], max_new_tokens=9, progress=done.append)
    assert done == list(range(1, 2 * len(decoders) + 1))
    assert {(row.draft, row.verify) for row in rows} == set(decoders)
    assert all(row.same_words == 1 for row in rows)
    plain = next(row for row in rows if row.draft == "autoregressive")
    assert (plain.times_plain.value, plain.tokens_per_pass.value, plain.draft_share) == (1.0, 1.0, 0.0)
    assert all(row.draft_share > 0 and row.tokens_per_pass.value > 1 for row in rows if row is not plain)
    for ending in ("png", "svg"):
        save_grid(rows, tmp_path / f"plot.{ending}", "a title")
        assert (tmp_path / f"plot.{ending}").stat().st_size > 1000
    with pytest.raises(InputError, match=r"plot: .*must end in \.png"):
        save_grid(rows, tmp_path / "plot.txt", "a title")


def test_without_a_draft_model_the_rest_is_measured(tiny_llama: PreTrainedModel) -> None:
    assert list(lossless_pairs(Session(tiny_llama), None, Sampling(), DRAFTERS)) == [
        ("autoregressive", "token-matching")
    ]


def test_one_prompt_is_too_few(tiny_llama: PreTrainedModel) -> None:
    decoders = lossless_pairs(Session(tiny_llama), None, Sampling(), ["autoregressive"])
    with pytest.raises(InputError, match="prompts: 1 are too few"):
        measure_grid(decoders, [[1]])
