"""Beam search in a token tree: the texts of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import tiny_model
from tokenworks.core.errors import InputError
from tokenworks.core.session import Session
from tokenworks.decode.beam import BeamSearch


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("beams", [1, 2, 3])
def test_the_texts_are_those_of_transformers(kind: str, beams: int) -> None:
    model = tiny_model(kind)
    search = BeamSearch(Session(model), beams)
    reasons = set()
    for seed in range(8):
        random = torch.Generator().manual_seed(seed)
        ids = torch.randint(97, (1, 5), generator=random)
        stops = torch.randint(97, (12,), generator=random).tolist()
        theirs = model.generate(  # type: ignore[operator]
            ids, num_beams=beams, do_sample=False, max_new_tokens=12, eos_token_id=stops, pad_token_id=0,
            attention_mask=torch.ones_like(ids),
        )[0, 5:].tolist()  # fmt: skip
        found = search.generate(ids[0], 12, stops)
        assert found.token_ids == theirs[: len(found.token_ids)]
        assert not any(theirs[len(found.token_ids) :]), "what follows is padding"
        reasons.add(found.finish_reason)
    assert reasons == {"stop", "length"}


def test_one_pass_a_step_runs_all_beams(tiny_llama: PreTrainedModel) -> None:
    found = BeamSearch(Session(tiny_llama), 3).generate([1, 2, 3], 7)
    assert found.target_passes == 7
    assert found.nodes == 3 * 6
    assert len(found.beams) == 3
    assert [beam.score for beam in found.beams] == sorted((beam.score for beam in found.beams), reverse=True)


def test_scores_are_mean_log_probabilities(tiny_llama: PreTrainedModel) -> None:
    best = BeamSearch(Session(tiny_llama), 3).generate([1, 2, 3], 6).beams[0]
    with torch.inference_mode():
        rows = torch.log_softmax(tiny_llama(torch.tensor([[1, 2, 3, *best.token_ids]])).logits[0, 2:-1], -1)
    own = rows.gather(1, torch.tensor(best.token_ids)[:, None]).mean()
    assert best.score == pytest.approx(float(own), abs=1e-5)


def test_a_rule_ends_a_beam(tiny_llama: PreTrainedModel) -> None:
    found = BeamSearch(Session(tiny_llama), 3).generate([1, 2, 3], 30, stop=lambda ids: len(ids) == 4)
    assert (len(found.token_ids), found.finish_reason) == (4, "stop")


def test_the_context_is_not_overrun(tiny_llama: PreTrainedModel) -> None:
    found = BeamSearch(Session(tiny_llama, max_length=9), 2).generate([1, 2, 3], 30)
    assert (len(found.token_ids), found.finish_reason) == (7, "context")


def test_misuse(tiny_llama: PreTrainedModel) -> None:
    for beams in (0, 98):
        with pytest.raises(InputError, match="beams"):
            BeamSearch(Session(tiny_llama), beams)
    with pytest.raises(InputError, match="max_new_tokens"):
        BeamSearch(Session(tiny_llama)).generate([1], 0)
