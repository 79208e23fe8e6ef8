"""Policy and reference read pairs: every number at its own token, whatever the padding."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import tiny_model
from tokenworks.align.contract import Needs
from tokenworks.align.reading import Batch, EncodedPair, collate, encode_pair, let_read, read_pairs
from tokenworks.core.corpus import train_bpe
from tokenworks.core.errors import InputError

PAIRS = [EncodedPair([1, 2, 3], [4, 5, 6], [7, 8]), EncodedPair([9, 2], [10, 11, 12, 13, 14], [15])]
NEEDS = Needs(divergence=True, states=True)


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return tiny_model("llama", seed=1)


def test_numbers_stand_at_the_tokens_they_are_about(
    tiny_llama: PreTrainedModel, reference: PreTrainedModel
) -> None:
    found = read_pairs(tiny_llama, reference, collate(PAIRS), NEEDS)
    responses = [pair.chosen for pair in PAIRS] + [pair.rejected for pair in PAIRS]
    for row, (pair, response) in enumerate(zip(PAIRS * 2, responses, strict=True)):
        ids = torch.tensor([pair.prompt + response])
        begin = len(pair.prompt) - 1  # the place that predicts the response's first token
        places = slice(begin, begin + len(response))
        assert found.mask[row].nonzero()[:, 0].tolist() == list(range(begin, begin + len(response)))
        log_p, log_ref = (m(ids).logits[0].log_softmax(-1)[places] for m in (tiny_llama, reference))
        rows = torch.arange(len(response))
        torch.testing.assert_close(found.log_p[row, places], log_p[rows, response], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.log_ref[row, places], log_ref[rows, response], atol=1e-5, rtol=1e-4)
        divergence = (log_ref.exp() * (log_ref - log_p)).sum(-1)
        torch.testing.assert_close(found.divergence[row, places], divergence, atol=1e-5, rtol=1e-4)  # type: ignore[index]
        layers = reference(ids, output_hidden_states=True).hidden_states[1:]
        states = torch.stack([layer[0, places] for layer in layers], 1)
        torch.testing.assert_close(found.states[row, places], states, atol=1e-5, rtol=1e-4)  # type: ignore[index]
    for values in (found.log_p, found.log_ref, found.divergence):
        assert (values[~found.mask] == 0).all()  # type: ignore[index]


def test_padding_and_neighbours_change_nothing(tiny_llama: PreTrainedModel, reference: PreTrainedModel) -> None:
    alone = [read_pairs(tiny_llama, reference, collate([pair]), NEEDS) for pair in PAIRS]
    together = read_pairs(tiny_llama, reference, collate([*PAIRS, EncodedPair([1], [2] * 20, [3])], 5), NEEDS)
    for number, single in enumerate(alone):
        for row, other in ((0, number), (1, number + 3)):
            width = single.mask.shape[1]
            torch.testing.assert_close(
                together.log_ratio[other, :width], single.log_ratio[row], atol=1e-5, rtol=1e-4
            )
            torch.testing.assert_close(
                together.divergence[other, :width],
                single.divergence[row],
                atol=1e-5,
                rtol=1e-4,  # type: ignore[index]
            )


def test_the_divergence_looks_at_prefixes_only(tiny_llama: PreTrainedModel, reference: PreTrainedModel) -> None:
    one, other = (
        read_pairs(tiny_llama, reference, collate([EncodedPair([1, 2], [3, 4, last], [5])]), NEEDS)
        for last in (6, 7)
    )
    torch.testing.assert_close(one.divergence, other.divergence)
    assert not torch.allclose(one.log_ratio[0], other.log_ratio[0])


def test_gradients_reach_the_policy_alone(reference: PreTrainedModel) -> None:
    policy = tiny_model("llama", seed=0)
    found = read_pairs(policy, reference, collate(PAIRS), NEEDS)
    (found.log_ratio.sum() + found.divergence.sum()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in policy.parameters())
    assert all(p.grad is None for p in reference.parameters())


def test_a_model_that_lets_read_is_otherwise_as_it_was(reference: PreTrainedModel) -> None:
    policy = tiny_model("llama", seed=0)
    before = policy(torch.tensor([[1, 2, 3]])).logits
    let_read(policy)
    let_read(policy)
    torch.testing.assert_close(policy(torch.tensor([[1, 2, 3]])).logits, before)
    copied = copy.deepcopy(policy)
    with torch.no_grad():
        copied.get_output_embeddings().weight.zero_()
    assert copied(torch.tensor([[1, 2, 3]])).logits.abs().max() == 0
    assert policy.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False).shape == (1, 4)  # type: ignore[operator]


def test_text_is_encoded_apart_and_ends() -> None:
    tokenizer = train_bpe(["nothing to merge"], 257, special=["<end>"])
    tokenizer.eos_token = "<end>"
    pair = encode_pair(tokenizer, "ab", " c", "d")
    assert (len(pair.prompt), len(pair.chosen), len(pair.rejected)) == (2, 3, 2)
    assert pair.chosen[-1] == pair.rejected[-1] == tokenizer.eos_token_id


def test_misuse(tiny_llama: PreTrainedModel, reference: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="pairs: empty"):
        collate([])
    with pytest.raises(InputError, match="empty prompt or response"):
        collate([EncodedPair([1], [], [2])])
    with pytest.raises(InputError, match="ref_model: it knows 33 tokens and the policy 97"):
        read_pairs(tiny_llama, tiny_model("llama", vocab_size=33), collate(PAIRS), NEEDS)
    with pytest.raises(InputError, match="batch: it has no scores, and the method needs a lexicon"):
        read_pairs(tiny_llama, reference, collate(PAIRS), Needs(scores="a lexicon"))


def test_scores_are_padded_with_their_tokens() -> None:
    scored = [
        EncodedPair([1, 2], [3, 4], [5], [0.5, 1.5], [2.5]),
        EncodedPair([1], [3], [5, 6], [3.5], [4.5, 5.5]),
    ]
    batch: Batch = collate(scored)
    assert batch.scores is not None
    assert batch.scores[batch.mask].tolist() == [0.5, 1.5, 3.5, 2.5, 4.5, 5.5]
