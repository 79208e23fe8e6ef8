"""Session: a node of a token tree gets the logits its path would get alone, and the cache forgets the rest."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import CONFIGS, tiny_model
from tokenworks.core.errors import InputError, NumericalError, UnsupportedModelError
from tokenworks.core.session import FIRST_CAPACITY, Session
from tokenworks.core.tree import ROOT, TokenTree, TreeShape

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def random_tree(nodes: int, seed: int) -> TokenTree:
    generator = torch.Generator().manual_seed(seed)
    parents = [int(torch.randint(ROOT, node, (1,), generator=generator)) if node else ROOT for node in range(nodes)]
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
