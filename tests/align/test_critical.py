"""Critical tokens: by hand-made scores, by rollouts of a chain with known chances, and the data made of
samples."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from scipy.stats import binom
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tests.conftest import tiny_model
from tokenworks.align import rollouts
from tokenworks.align.critical import (
    CriticalTokens,
    Sample,
    build_startup_data,
    critical_tokens_by_rollout,
    find_critical,
    pass_at_k,
    replacement_test,
)
from tokenworks.align.rollouts import sample_continuations
from tokenworks.core.corpus import train_bpe
from tokenworks.core.errors import InputError
from tokenworks.core.sampling import Sampling


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    found = train_bpe(["nothing to merge"], 257, special=["<end>"])
    found.eos_token = "<end>"
    return found


CHAIN = {
    "a": {"a": 0.3, "b": 0.4, "c": 0.3},
    "b": {"a": 0.5, "!": 0.3, "c": 0.2},
    "c": {"c": 0.6, "": 0.4},  # of no return
    "!": {"": 1.0},
}
"""What follows each letter; "" is the end. Right are texts with a "!"."""


def chances() -> dict[str, float]:
    """Of coming to a "!" from behind each letter, by iteration."""
    found = dict.fromkeys(CHAIN, 0.0) | {"!": 1.0}
    for _ in range(500):
        found |= {letter: sum(p * found.get(after, 0.0) for after, p in CHAIN[letter].items()) for letter in "abc"}
    return found


@pytest.fixture(scope="module")
def chain(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A Llama without layers whose logits follow `CHAIN`: a token's embedding is one axis, the head a table."""
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=256, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.lm_head.weight.fill_(0)
        embed = torch.zeros(size, 8)
        head = torch.full((size, 8), -40.0)
        for axis, (letter, after) in enumerate(CHAIN.items()):
            embed[tokenizer(letter)["input_ids"][0], axis] = 1
            for other, p in after.items():
                token = tokenizer(other)["input_ids"][0] if other else tokenizer.eos_token_id
                head[token, axis] = torch.tensor(p).log()
        model.model.embed_tokens.weight.copy_(embed)
        model.lm_head.weight.copy_(head / 8**0.5)  # the norm makes sqrt(8) of a one
    return model


def right(text: str) -> bool:
    return "!" in text


@pytest.mark.parametrize(
    ("scores", "index"),
    [
        ([20, 5, 0, 0, 0], 2), ([9, 0, 4, 0, 0], 3), ([9, 0, 3, 0], 1), ([9, 0, 4, 2], 1), ([9, 4, 2], None),
        ([0, 0], 0), ([], None), ([5, 0, 9, 0, 9, 1], 3),
    ],
)  # fmt: skip
def test_find_critical(scores: list[int], index: int | None) -> None:
    assert find_critical(scores) == index


def test_pass_at_k() -> None:
    for n, c in itertools.product((1, 5, 8), range(9)):
        if c > n:
            continue
        found = [pass_at_k(n, c, k) for k in range(1, n + 1)]
        assert found[0] == pytest.approx(c / n)
        assert found[-1] == (1 if c else 0)
        assert found == sorted(found)
    chance, trials = random.Random(0), 4000
    p, n, k = 0.2, 8, 3
    mean = sum(pass_at_k(n, sum(chance.random() < p for _ in range(n)), k) for _ in range(trials)) / trials
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=0.02)  # five standard errors


def test_rollouts_count_what_the_chain_says(chain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Within binomial bounds of 99.9% in all; behind "c" nothing comes right, which makes it the critical
    token."""
    text, n = "abac", 400
    found = critical_tokens_by_rollout(chain, tokenizer, "a", text, right, n, high=0, top_p=1.0, seed=0)
    assert found.token_ids[:-1] == tokenizer(text)["input_ids"]
    for letter, score in zip(text, found.scores, strict=False):
        low, high = binom.interval(1 - 0.001 / len(text), n, chances()[letter])
        assert low <= score <= high
    assert found.scores[-2:] == [0, 0]
    assert found.index == 3


def test_success_is_a_martingale(chain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The mean over next tokens of the success behind them is the success before."""
    n, before = 3000, "ab"
    after = {"ab" + token: p for token, p in CHAIN["b"].items()}

    def share(text: str) -> float:
        ids = [tokenizer(text)["input_ids"]]
        written = sample_continuations(chain, ids, n, 100, Sampling(1.0), [tokenizer.eos_token_id], seed=1)[0]
        return sum(right(text + tokenizer.decode(row)) for row in written) / n

    mean = sum(p * share(text) for text, p in after.items())
    assert mean == pytest.approx(share(before), abs=0.04)  # four standard errors of the two
    assert share(before) == pytest.approx(chances()["b"], abs=0.04)


def test_another_token_saves_the_text(chain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    found = replacement_test(chain, tokenizer, "a", "abac", 3, right, n=400, top_p=1.0, seed=0)
    assert found.kept == 0
    low, high = binom.interval(0.999, 400, chances()["a"])
    assert low <= found.replaced <= high
    kept, replaced = found.pass_at(4)
    assert kept == 0
    assert replaced > found.pass_at(1)[1] > 0.2


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_rollouts_read_as_the_model_alone_does(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy continuations of prefixes of different lengths, in batches, are those of `generate`."""
    model = tiny_model(kind)
    prefixes = [[5, 6, 7], [1], [9, 8, 7, 6, 5], [3, 3], [4] * 7]

    def alone(prefix: list[int], stops: list[int] | None) -> list[int]:
        ids = torch.tensor([prefix])
        written = model.generate(  # type: ignore[operator]
            ids, do_sample=False, max_new_tokens=8, eos_token_id=stops, pad_token_id=0,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
        return list(written[0, len(prefix) :].tolist())

    stops = [alone(prefixes[0], None)[3], alone(prefixes[2], None)[1]]
    expected = [alone(prefix, stops) for prefix in prefixes]
    for rows in (2, 100):
        monkeypatch.setattr(rollouts, "ROWS", rows)
        found = sample_continuations(model, prefixes, 2, 8, Sampling(), stops)
        assert found == [[own, own] for own in expected]
    assert len({len(own) for own in expected}) > 1


def test_rollouts_follow_the_distribution(tiny_llama: PreTrainedModel) -> None:
    sampling, n = Sampling(0.9, top_p=0.8), 4000
    written = sample_continuations(tiny_llama, [[1, 2], [3, 4, 5]], n, 1, sampling, [], seed=0)
    for prefix, rows in zip(([1, 2], [3, 4, 5]), written, strict=True):
        p = sampling.distribution(tiny_llama(torch.tensor([prefix])).logits[0, -1].detach())
        counts = torch.bincount(torch.tensor(rows)[:, 0], minlength=97)
        assert not counts[p == 0].any()
        assert float((counts / n - p).abs().max()) < 0.04  # five standard errors
    again = sample_continuations(tiny_llama, [[1, 2], [3, 4, 5]], n, 1, sampling, [], seed=0)
    assert again == written


def test_a_trace_marks_the_token(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [*tokenizer("abc")["input_ids"], tokenizer.eos_token_id]
    trace = CriticalTokens(2, [32, 16, 0, 0], 64, ids).trace(tokenizer)
    assert trace.channels["success"].values == [0.5, 0.25, 0, 0]
    assert trace.channels["critical"].values == [None, None, "critical", None]


# --- start-up data --------------------------------------------------------------------------------------------


def checker(prompt: str) -> Callable[[str], bool]:
    return lambda response: response.endswith("=" + prompt)


def samples(*answers: str) -> list[Sample]:
    return [Sample(f"{number}={answer}", answer) for number, answer in enumerate(answers)]


def test_the_rule_of_the_start_up_data() -> None:
    found = build_startup_data({"7": samples("7", "8", "9", "8", "", "7", "9", "9", "5", "4")}, checker)
    assert found.positive == [("7", "0=7")]
    # 7 wrong samples: 9 came three times, 8 twice, and together they are more than half.
    assert found.negative == [("7", "2=9"), ("7", "1=8")]
    assert found.pairs == [("7", "0=7", "2=9")]


def test_rare_wrong_answers_are_taken_only_first() -> None:
    found = build_startup_data({"7": samples("7", "1", "2", "3", "4")}, checker)
    assert found.negative == [("7", "1=1")]
    most = build_startup_data({"7": samples("7", "1", "1", "1", "2", "2")}, checker)
    assert most.negative == [("7", "1=1")], "three of five are more than half"


def test_one_kind_of_answer_makes_no_pair() -> None:
    found = build_startup_data({"7": samples("7", "8"), "5": samples("5", "5"), "3": samples("", "4")}, checker)
    assert [prompt for prompt, _ in found.positive] == ["7", "5"]
    assert [prompt for prompt, _ in found.negative] == ["7", "3"]
    assert [prompt for prompt, _, _ in found.pairs] == ["7"]
    for only in ({"5": samples("5")}, {"5": samples("4")}, {"5": samples("")}, {}):
        with pytest.raises(InputError, match="samples: no prompt has both"):
            build_startup_data(only, checker)


def test_misuse(chain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="scores: 65 at token 1"):
        find_critical([0, 65])
    with pytest.raises(InputError, match="n, high: 0"):
        find_critical([0], n=0)
    with pytest.raises(InputError, match="n, c, k: 4, 5 and 1"):
        pass_at_k(4, 5, 1)
    with pytest.raises(InputError, match="n, c, k: 4, 2 and 5"):
        pass_at_k(4, 2, 5)
    with pytest.raises(InputError, match="budget: 64 rollouts behind each of 3 tokens are 192"):
        critical_tokens_by_rollout(chain, tokenizer, "a", "abc", right, budget=100)
    with pytest.raises(InputError, match="response: the checker says that it is right"):
        critical_tokens_by_rollout(chain, tokenizer, "a", "b!", right)
    with pytest.raises(InputError, match="prompt, response: empty"):
        critical_tokens_by_rollout(chain, tokenizer, "a", "", right)
    with pytest.raises(InputError, match="index: 3 is none of the response's 3"):
        replacement_test(chain, tokenizer, "a", "abc", 3, right)
    with pytest.raises(InputError, match="prefixes: an empty one"):
        sample_continuations(chain, [[1], []], 1, 1, Sampling(), [])
    with pytest.raises(InputError, match="n, max_new_tokens: 0"):
        sample_continuations(chain, [[1]], 0, 1, Sampling(), [])


def test_the_chain_is_the_model_it_should_be(chain: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    row = torch.softmax(chain(torch.tensor([tokenizer("ab")["input_ids"]])).logits[0, -1], -1)
    for letter, p in CHAIN["b"].items():
        token = tokenizer(letter)["input_ids"][0] if letter else tokenizer.eos_token_id
        assert float(row[token]) == pytest.approx(p, abs=1e-4)
