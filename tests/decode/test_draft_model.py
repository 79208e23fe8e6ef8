"""DraftModel: its cache stays in step with the text, and its vocabulary may be a part of the target's."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import tiny_model
from tokenworks.core.errors import InputError
from tokenworks.core.sampling import Sampling
from tokenworks.core.session import Session
from tokenworks.decode.contract import Verdict
from tokenworks.decode.draft_model import GREEDY_TEMPERATURE, DraftModel
from tokenworks.decode.rsd import ConstantBranching, RecursiveRejection
from tokenworks.decode.speculative import SpeculativeDecoder
from tokenworks.decode.speculative_sampling import DraftChain
from tokenworks.testing import ToyTarget, check_drafter


def own_distribution(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    return torch.softmax(model(input_ids=torch.tensor([ids])).logits[0, -1], -1)


@torch.inference_mode()
def test_every_node_has_the_drafts_own_distribution(tiny_llama: PreTrainedModel) -> None:
    """After any number of accepted tokens, run or not, the cache holds the text and nothing else."""
    draft = DraftModel(Session(tiny_llama), 97)
    draft.start([5, 6], Sampling(1.0), None)
    context = [5, 6]
    for accepted in ([0], [0, 1], [0, 1, 3], [0, 2]):
        tree = draft.plant(context)
        one, two = tree.add(0, 11), tree.add(0, 12)
        tree.run([one])
        three = tree.add(one, 13)
        tree.run([three, two])
        for node in (0, one, two, three):
            path = context + [tree.tokens[n] for n in tree.finish(False).tree.shape.path_to(node)][1:]
            assert torch.allclose(tree.distributions[node], own_distribution(tiny_llama, path), atol=1e-5)
        path = {1: one, 2: two, 3: three}
        tree.keep(Verdict([0] + [path[n] for n in accepted[1:]], 20, [1.0] * (len(accepted) - 1)))
        context = context + [tree.tokens[path[n]] for n in accepted[1:]] + [20]
        assert draft.session.tokens == context[:-1]


def test_a_draft_never_verified_leaves_nothing(tiny_llama: PreTrainedModel) -> None:
    draft = DraftModel(Session(tiny_llama), 97)
    draft.start([5, 6], Sampling(1.0), None)
    tree = draft.plant([5, 6])
    tree.run([tree.add(0, 3)])
    again = draft.plant([5, 6])
    assert torch.allclose(again.distributions[0], tree.distributions[0], atol=1e-5)
    draft.start([5, 9, 9], Sampling(1.0), None)
    assert draft.session.tokens == [5], "what two prompts share stays in the cache"


@pytest.mark.parametrize(("asked", "target", "drawn_at"), [(None, 0.7, 0.7), (None, 0.0, 0.6), (0.3, 1.0, 0.3)])
def test_the_drafts_temperature(asked: float | None, target: float, drawn_at: float) -> None:
    draft = DraftModel(ToyTarget(3), 3, temperature=asked)
    draft.start([0], Sampling(target), None)
    assert draft.sampling.temperature == drawn_at
    assert GREEDY_TEMPERATURE == 0.6


def test_a_head_that_knows_a_part_of_the_vocabulary(tiny_llama: PreTrainedModel) -> None:
    session = Session(tiny_llama)
    known = torch.arange(0, 97, 3)
    small = tiny_model("llama", seed=3, num_hidden_layers=1)
    small.set_output_embeddings(torch.nn.Linear(32, len(known), bias=False))
    helper = DraftModel(Session(small), session.vocab_size, known)
    assert helper.session.input_size == 97
    drafter = ConstantBranching(helper, (3, 2))
    check_drafter(drafter, session)
    drafter.start([1], Sampling(1.0), None)
    draft = drafter.propose([1], 2)
    assert set(draft.tree.tokens[1:].tolist()) <= set(known.tolist())
    sampled = SpeculativeDecoder(session, drafter, RecursiveRejection(), Sampling(1.0)).generate([1], 20, seed=0)
    assert len(sampled.token_ids) == 20


def test_a_draft_with_a_shorter_context_stops_drafting(tiny_llama: PreTrainedModel) -> None:
    session = Session(tiny_llama)
    drafter = DraftChain(DraftModel(Session(tiny_llama, max_length=12), 97), 3)
    found = SpeculativeDecoder(session, drafter).generate([1, 2, 3], 24)
    assert found.token_ids == SpeculativeDecoder(session).generate([1, 2, 3], 24).token_ids


def test_logits_wider_than_the_targets_are_cut() -> None:
    draft = DraftModel(ToyTarget(5), 3)
    draft.start([0], Sampling(1.0), None)
    assert len(draft.plant([0]).distributions[0]) == 3


def test_clear_errors() -> None:
    with pytest.raises(InputError, match="vocabulary: expected 3 ids below 3, got"):
        DraftModel(ToyTarget(3), 3, torch.tensor([0, 1]))
    with pytest.raises(InputError, match="vocabulary"):
        DraftModel(ToyTarget(3), 3, torch.tensor([0, 1, 7]))
    with pytest.raises(InputError, match="length: 0"):
        DraftChain(DraftModel(ToyTarget(3), 3), 0)
