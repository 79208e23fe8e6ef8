"""Session: a node of a token tree gets the logits its path would get alone, and the cache forgets the rest."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from tests.conftest import CONFIGS, tiny_model
from tokenworks.core.errors import InputError, NumericalError, UnsupportedModelError
from tokenworks.core.session import FIRST_CAPACITY, Session
from tokenworks.core.tree import ROOT, TokenTree, TreeShape

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def random_tree(nodes: int, seed: int) -> TokenTree:
    generator = torch.Generator().manual_seed(seed)
    parents = [
        int(torch.randint(ROOT, node, (1,), generator=generator)) if node else ROOT for node in range(nodes)
    ]
    return TokenTree.of(torch.randint(0, 97, (nodes,), generator=generator), parents)


def own_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def assert_same_cache(session: Session, model: PreTrainedModel) -> None:
    plain = Session(model)
    plain.prefill(session.tokens)
    for (key, value), (plain_key, plain_value) in zip(session.cached(), plain.cached(), strict=True):
        assert key.shape[2] == session.length
        torch.testing.assert_close(key, plain_key, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(value, plain_value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_tree_logits_are_path_logits_and_commit_leaves_a_plain_cache(kind: str, seed: int) -> None:
    model = tiny_model(kind, seed)
    session = Session(model)
    session.prefill(PROMPT)
    tree = random_tree(24, seed)
    logits = session.extend(tree)
    for node in range(len(tree)):
        path = tree.shape.path_to(node)
        alone = own_logits(model, PROMPT + tree.tokens[path].tolist())[-1]
        torch.testing.assert_close(logits[node], alone, atol=1e-4, rtol=1e-4)
    path = tree.shape.path_to(int(tree.shape.depths.argmax()))
    session.commit(path)
    assert session.tokens == PROMPT + tree.tokens[path].tolist()
    assert_same_cache(session, model)
    again = session.extend([7])
    torch.testing.assert_close(again[0], own_logits(model, [*session.tokens, 7])[-1], atol=1e-4, rtol=1e-4)


def test_a_tree_grown_in_several_passes_equals_one_pass(tiny_llama: PreTrainedModel) -> None:
    tree = random_tree(12, 3)
    session = Session(tiny_llama)
    session.prefill(PROMPT)
    whole = session.extend(tree)
    session.rollback()
    parts = [
        session.extend(TokenTree.of(tree.tokens[start : start + 4], tree.shape.parents[start : start + 4], start))
        for start in (0, 4, 8)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-4, rtol=1e-4)


def test_chains_continue_and_rollback_forgets(tiny_llama: PreTrainedModel) -> None:
    session = Session(tiny_llama)
    session.prefill(PROMPT)
    session.extend([11, 12])
    after = session.extend([13])
    torch.testing.assert_close(after[0], own_logits(tiny_llama, [*PROMPT, 11, 12, 13])[-1], atol=1e-4, rtol=1e-4)
    session.rollback()
    assert (session.tokens, session.pending) == (PROMPT, 0)
    session.rollback(4)
    assert session.tokens == PROMPT[:4]
    torch.testing.assert_close(
        session.extend([8])[0], own_logits(tiny_llama, [*PROMPT[:4], 8])[-1], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_hidden_states_are_what_the_head_read(kind: str) -> None:
    model = tiny_model(kind)
    session, other = Session(model), Session(model)
    session.prefill(PROMPT[:4])
    assert session.hidden is None
    session.keep_hidden = True
    session.prefill(PROMPT[4:])
    with torch.no_grad():
        states = model(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states[-1][0]
    assert session.hidden is not None
    torch.testing.assert_close(session.hidden, states[-1:], atol=1e-4, rtol=1e-4)
    kept = session.hidden
    other.prefill([7, 7])
    assert session.hidden is kept, "another Session of the same model does not reach it"
    assert other.hidden is None
    tree = random_tree(6, 0)
    session.extend(tree)
    path = tree.shape.path_to(5)
    with torch.no_grad():
        text = torch.tensor([PROMPT + tree.tokens[path].tolist()])
        states = model(text, output_hidden_states=True).hidden_states[-1][0]
    assert session.hidden.shape == (6, 32)
    torch.testing.assert_close(session.hidden[5], states[-1], atol=1e-4, rtol=1e-4)
    session.rollback(0)
    read: list[torch.Tensor] = []
    session.prefill(PROMPT, lambda ids, logits: read.append(session.hidden))  # type: ignore[arg-type]
    assert [part.shape for part in read] == [(len(PROMPT), 32)]
    session.keep_hidden = False
    session.extend([3])
    assert len(session.hidden) == len(PROMPT), "no longer followed"


def test_the_cache_grows_past_its_first_capacity_and_prefill_runs_in_chunks() -> None:
    model = tiny_model("llama", max_position_embeddings=2048)
    ids = (torch.arange(FIRST_CAPACITY + 300) % 97).tolist()
    session = Session(model)
    first = session.prefill(ids)
    torch.testing.assert_close(first, own_logits(model, ids)[-1], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(session.extend([5])[0], own_logits(model, [*ids, 5])[-1], atol=1e-3, rtol=1e-3)


def test_sessions_that_share_a_model_do_not_meet(tiny_llama: PreTrainedModel) -> None:
    one, two = Session(tiny_llama), Session(tiny_llama)
    one.prefill([1, 2, 3])
    two.prefill([4, 5])
    torch.testing.assert_close(one.extend([6])[0], own_logits(tiny_llama, [1, 2, 3, 6])[-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(two.extend([6])[0], own_logits(tiny_llama, [4, 5, 6])[-1], atol=1e-4, rtol=1e-4)


def test_the_users_model_is_untouched_and_a_changed_weight_is_seen() -> None:
    model = tiny_model("llama")
    attention, modules = model.config._attn_implementation, [type(m) for m in model.modules()]
    Session(model).extend([1])
    assert model.config._attn_implementation == attention
    assert [type(m) for m in model.modules()] == modules
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    torch.testing.assert_close(Session(model).extend([1])[0], own_logits(model, [1])[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "reason"), [("mamba", "recurrent"), ("t5", "encoder-decoder"), ("bloom", "mask from outside")]
)
def test_architectures_without_trees_are_refused_by_name(kind: str, reason: str) -> None:
    config = AutoConfig.for_model(
        kind, vocab_size=97, hidden_size=32, num_hidden_layers=1, d_model=32, num_layers=1
    )
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model = auto.from_config(config)
    with pytest.raises(UnsupportedModelError, match=rf"{type(model).__name__}.*{reason}"):
        Session(model)


def test_an_unknown_architecture_must_prove_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenworks.core.session.PROVED", frozenset())
    assert Session(tiny_model("llama")).length == 0
    monkeypatch.setattr("tokenworks.core.architectures._gap", lambda *_: 0.5)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM.*differ by 5.0e-01"):
        Session(tiny_model("llama"))


def test_bad_input_is_named(tiny_llama: PreTrainedModel) -> None:
    session = Session(tiny_llama)
    session.prefill(PROMPT)
    for tokens, words in (
        ([], "tokens: empty"),
        ([97], "id 97 is outside"),
        ([-1], "id -1 is outside"),
        (torch.ones(2, 3, dtype=torch.long), "one sequence"),
        ([1.5], "integer ids"),
        (list(range(97)) * 2, "context of 128"),
    ):
        with pytest.raises(InputError, match=words):
            session.extend(tokens)
        with pytest.raises(InputError, match=words):
            session.prefill(tokens)
        assert (session.tokens, session.pending) == (PROMPT, 0)
    session.extend(TokenTree.of([1, 2, 3], [ROOT, 0, 0]))
    for path in ([1], [0, 0], [1, 2], [0, 3], [-1]):
        with pytest.raises(InputError, match="not a path"):
            session.commit(path)
    with pytest.raises(InputError, match="numbered from 0, but 3"):
        session.extend(TokenTree.of([1], [ROOT]))
    with pytest.raises(InputError, match="pending"):
        session.prefill([1])
    with pytest.raises(InputError, match="length: 99"):
        session.rollback(99)
    with pytest.raises(InputError, match="max_length"):
        Session(tiny_llama, max_length=129)
    for parents in ([0], [-2], [ROOT, 1]):
        with pytest.raises(InputError, match="comes before its child"):
            TreeShape(tuple(parents))
    with pytest.raises(InputError, match="2 tokens for a tree of 1"):
        TokenTree.of([1, 2], [ROOT])


def test_nan_logits_leave_nothing_behind() -> None:
    model = tiny_model("llama")
    session = Session(model)
    session.prefill([1])
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    broken = Session(model)
    for call in (broken.prefill, broken.extend):
        with pytest.raises(NumericalError, match="model: it returned NaN"):
            call([1, 2])
        assert (broken.length, broken.pending) == (0, 0)


@torch.no_grad()
def test_added_inputs_are_read_and_never_predicted(tiny_llama: PreTrainedModel) -> None:
    extra = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    session = Session(tiny_llama)
    assert session.add_inputs(extra[:1]) == 97
    assert session.add_inputs(extra[1:]) == 98
    assert (session.vocab_size, session.input_size) == (97, 99)
    logits = session.extend([5, 98, 6, 97])
    own = tiny_llama.get_input_embeddings()(torch.tensor([5, 0, 6, 0]))
    own[1], own[3] = extra[1], extra[0]
    assert torch.allclose(logits, tiny_llama(inputs_embeds=own[None]).logits[0], atol=1e-4)
    with pytest.raises(InputError, match="id 99 is outside the model's vocabulary of 99"):
        session.extend([99])
    with pytest.raises(InputError, match=r"embeddings: expected \[m, 32\], got \[2, 31\]"):
        session.add_inputs(extra[:, 1:])
