"""Search over a policy: transformers' beams, the solver's beams, the best text of a tree that can be
enumerated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.align.test_soft_q import T, V, solver, table
from tests.conftest import tiny_model
from tokenworks.align.search import Found, beam_search
from tokenworks.align.soft_q import SoftQSolver, Text
from tokenworks.align.tree_search import mcts
from tokenworks.core.corpus import train_bpe
from tokenworks.core.errors import InputError
from tokenworks.core.session import Session
from tokenworks.core.tree import ROOT, TokenTree
from tokenworks.testing import ToyTarget


class Table(ToyTarget):
    """An Engine whose logits are a table's of the text so far; the prompt, token 0, counts for nothing."""

    def __init__(self, logits: dict[Text, Tensor]) -> None:
        super().__init__(V)
        self.logits = logits
        self.paths: list[Text] = []

    def prefill(self, tokens: Sequence[int] | Tensor, reader: Any = None) -> Tensor:
        super().prefill(tokens)
        self.paths = []
        return self.logits[()]

    def extend(self, tokens: Sequence[int] | Tensor | TokenTree) -> Tensor:
        assert isinstance(tokens, TokenTree)
        assert tokens.shape.first == len(self.paths)
        for token, parent in zip(tokens.tokens.tolist(), tokens.shape.parents, strict=True):
            self.paths.append((*(() if parent == ROOT else self.paths[parent]), token))
        return torch.stack([self.logits[path] for path in self.paths[-len(tokens) :]])

    def rollback(self, length: int | None = None) -> None:
        super().rollback(length)
        self.paths = []


def policy(found: SoftQSolver) -> Table:
    return Table(found.log_policy)


def reference(found: SoftQSolver) -> Table:
    return Table(found.log_ref)


def beams_by_reward_and_value(found: SoftQSolver, width: int) -> list[list[Text]]:
    """The beams of every length by sum of r + beta log ref so far, and V of where that comes to."""

    def worth(text: Text) -> float:
        return (
            found.total(found.rewards, text)
            + found.beta * found.total(found.log_ref, text)
            + found.values[text]
            - found.values[()]
        )

    levels: list[list[Text]] = [[()]]
    for _ in range(found.horizon):
        grown = [(*text, token) for text in levels[-1] for token in range(found.vocab)]
        levels.append(sorted(grown, key=worth, reverse=True)[:width])
    return levels


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", [1, 2, 3, 5, 9, 27, V**T])
def test_likelihood_ranks_as_reward_and_value_do(width: int, seed: int) -> None:
    found = solver(seed)
    levels = beams_by_reward_and_value(found, width)
    for length in range(1, T + 1):
        ours = beam_search(policy(found), [0], width, length)
        assert [text.token_ids for text in ours.texts] == levels[length]
    for text in ours.texts:
        assert found.beta * text.score == pytest.approx(
            found.total(found.rewards, text.token_ids)
            + found.beta * found.total(found.log_ref, text.token_ids)
            - found.values[()],
            abs=1e-4,
        )
    if width == V**T:
        assert ours.best.token_ids == max(found.texts(), key=lambda text: found.total(found.log_policy, text))


@pytest.mark.parametrize("seed", range(3))
def test_implicit_beams_find_the_highest_reward(seed: int) -> None:
    """With every text kept and every token a candidate, the first is the text of the highest reward: over whole
    texts the implicit reward is the reward less a constant."""
    found = solver(seed)
    ours = beam_search(
        policy(found), [0], V**T, T, reference=reference(found), scorer="implicit", beta=found.beta, top_p=1.0
    )
    best = max(found.texts(), key=lambda text: found.total(found.rewards, text))
    assert ours.best.token_ids == best
    assert ours.best.score == pytest.approx(found.total(found.rewards, best) - found.values[()], abs=1e-4)
    assert sum(ours.token_rewards(ours.best)) == pytest.approx(ours.best.score, abs=1e-5)
    assert len(ours.texts) == V**T


def test_a_floor_keeps_to_what_the_reference_may_say() -> None:
    found = solver(1)
    ours = beam_search(
        policy(found), [0], 2, T, reference=reference(found), scorer="implicit", beta=found.beta, top_p=0.4
    )
    for text in ours.texts:
        for state, token in found.steps(text.token_ids):
            p = found.log_ref[state].exp()
            assert float(p[p > p[token]].sum()) < 0.4
    free = beam_search(policy(found), [0], 2, T, reference=reference(found), scorer="implicit", top_p=1.0)
    assert free.best.token_ids != ours.best.token_ids


def test_an_implicit_search_does_not_stop_at_the_first_ends() -> None:
    """A text can end at once for little, or go on and gain: a score that may rise says nothing of the future."""
    end, on = 0, 1
    flat = {text: torch.zeros(V) for text in table(0)}
    keen = {text: torch.tensor([-9.0, 9.0, -9.0]) for text in flat} | {(): torch.tensor([1.0, 0.9, -9.0])}
    for beams in (1, 2):
        found = beam_search(Table(keen), [0], beams, T, [end], Table(flat), "implicit", top_p=1.0)
        assert found.best.token_ids == (on,) * T
        assert found.passes == T


def test_one_beam_is_greedy(tiny_llama: PreTrainedModel) -> None:
    for start in range(5):
        ids = torch.tensor([[start, 7, 3]])
        theirs = tiny_llama.generate(  # type: ignore[operator]
            ids, num_beams=1, do_sample=False, max_new_tokens=9, pad_token_id=0,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
        found = beam_search(Session(tiny_llama), ids[0], 1, 9)
        assert list(found.best.token_ids) == theirs[0, 3:].tolist()
        assert found.passes == 9


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("beams", [2, 3, 5])
def test_beams_are_those_of_transformers(kind: str, beams: int) -> None:
    model = tiny_model(kind)
    session, lengths = Session(model), set()
    for seed in range(6):
        random = torch.Generator().manual_seed(seed)
        ids = torch.randint(97, (1, 5), generator=random)
        stops = torch.randint(97, (12,), generator=random).tolist()
        theirs = model.generate(  # type: ignore[operator]
            ids, num_beams=beams, num_return_sequences=beams, do_sample=False, max_new_tokens=10,
            length_penalty=0.0, eos_token_id=stops, pad_token_id=0, attention_mask=torch.ones_like(ids),
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        found = beam_search(session, ids[0], beams, 10, stops)
        assert [text.score for text in found.texts] == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-4)
        for ours, row in zip(found.texts, theirs.sequences[:, 5:].tolist(), strict=True):
            assert list(ours.token_ids) == row[: len(ours.token_ids)]
            assert len(set(row[len(ours.token_ids) :])) <= 1, "what follows is padding"
        lengths |= {len(text.token_ids) for text in found.texts}
    assert len(lengths) > 1


def test_both_models_read_the_same_tree(tiny_llama: PreTrainedModel) -> None:
    """Numbers of both models along every beam are those of one pass over the text alone."""
    other = tiny_model("llama", seed=1)
    found = beam_search(
        Session(tiny_llama), [1, 2, 3], 4, 6, reference=Session(other), scorer="implicit", beta=0.5, top_p=1.0
    )
    for text in found.texts:
        ids = torch.tensor([[1, 2, 3, *text.token_ids]])
        for model, own in ((tiny_llama, text.log_p), (other, text.log_ref)):
            rows = torch.log_softmax(model(ids).logits[0, 2:-1], -1)
            expected = rows.gather(1, torch.tensor(text.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(own), expected, atol=1e-4, rtol=1e-4)
        assert text.score == pytest.approx(sum(found.token_rewards(text)), abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scorer", ["policy", "implicit"])
def test_tree_search_finds_the_best_text(scorer: Any, seed: int) -> None:
    found = solver(seed)

    def search(simulations: int) -> Found:
        return mcts(
            policy(found),
            [0],
            simulations,
            T,
            reference=reference(found),
            scorer=scorer,
            beta=found.beta,
            top_p=1.0,
        )

    every = search(10_000)
    assert every.exhausted
    assert len(every.texts) == V**T
    own = found.log_policy if scorer == "policy" else found.rewards
    best = max(found.texts(), key=lambda text: found.total(own, text))
    assert every.best.token_ids == best
    few = search(40)
    assert not few.exhausted
    # A third of what there is, but among it a text of the best ones.
    ranked = sorted(found.texts(), key=lambda text: -found.total(own, text))
    assert ranked.index(few.best.token_ids) < 4


def test_tree_search_without_an_end_still_gives_a_whole_text(tiny_llama: PreTrainedModel) -> None:
    found = mcts(Session(tiny_llama), [1, 2], simulations=2, max_new_tokens=6)
    assert len(found.best.token_ids) == 6
    assert found.passes <= 1 + 2 + 6


def test_tree_search_reads_texts_in_a_session_as_alone(tiny_llama: PreTrainedModel) -> None:
    found = mcts(Session(tiny_llama), [1, 2, 3], 30, 4, stop_ids=[5, 6, 7, 8])
    for text in found.texts:
        ids = torch.tensor([[1, 2, 3, *text.token_ids]])
        rows = torch.log_softmax(tiny_llama(ids).logits[0, 2:-1], -1)
        expected = rows.gather(1, torch.tensor(text.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(text.log_p), expected, atol=1e-4, rtol=1e-4)
        assert text.score == pytest.approx(sum(text.log_p), abs=1e-4)


def test_a_trace_of_the_best(tiny_llama: PreTrainedModel) -> None:
    tokenizer = train_bpe(["nothing to merge"], 257, special=["<end>"])
    found = beam_search(Session(tiny_llama), [1, 2], 3, 5, reference=Session(tiny_model("llama", 1)))
    trace = found.trace(tokenizer)
    assert set(trace.channels) == {"reward", "log_ref", "log_p", "shared"}
    assert trace.channels["shared"].values[-1] == 1
    assert set(beam_search(Session(tiny_llama), [1], 2, 3).trace(tokenizer).channels) == {"log_p", "shared"}


def test_the_context_is_not_overrun(tiny_llama: PreTrainedModel) -> None:
    for found in (
        beam_search(Session(tiny_llama, max_length=6), [1, 2, 3], 2, 30),
        mcts(Session(tiny_llama, max_length=6), [1, 2, 3], 40, 30),
    ):
        assert len(found.best.token_ids) == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"beams": 0}, "beams: 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"prompt": []}, "tokens: empty"),
        ({"scorer": "best"}, "scorer: no 'best'"),
        ({"scorer": "implicit"}, "reference: scorer"),
        ({"beta": 0.0}, "beta: 0.0"),
        ({"top_p": 0.0}, "top_p: 0.0"),
    ],
)
def test_misuse(changes: dict[str, Any], said: str, tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(InputError, match=said):
        beam_search(**({"policy": Session(tiny_llama), "prompt": [1], "beams": 2} | changes))
    if "beams" not in changes:
        with pytest.raises(InputError, match=said):
            mcts(**({"policy": Session(tiny_llama), "prompt": [1]} | changes))


def test_models_that_do_not_fit(tiny_llama: PreTrainedModel) -> None:
    other = Session(tiny_model("llama", vocab_size=33))
    with pytest.raises(InputError, match="reference: it knows 33 tokens and the policy 97"):
        beam_search(Session(tiny_llama), [1], reference=other)
    with pytest.raises(InputError, match="simulations, width, exploration"):
        mcts(Session(tiny_llama), [1], simulations=0)
