"""AdaDec: greedy where it should be, what a look ahead decides, and how the threshold is learned."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import tiny_model
from tokenworks.core.corpus import train_bpe
from tokenworks.core.errors import InputError
from tokenworks.core.models import LoadedModel
from tokenworks.core.session import Session
from tokenworks.decode.adadec import (
    AdaDec,
    AdaDecGeneration,
    function_body,
    left_function,
    random_pauses,
    stop_on_text,
)
from tokenworks.decode.adadec_threshold import (
    EntropyThreshold,
    entropy,
    fit_threshold,
    learn_threshold,
    load_threshold,
    teacher_forced,
)
from tokenworks.testing import ToyTarget

PROMPTS = [torch.randint(97, (5,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(6)]
STOPS = (3, 50)


def greedy(model: PreTrainedModel, prompt: list[int], length: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(  # type: ignore[operator]
        ids, do_sample=False, max_new_tokens=length, eos_token_id=list(STOPS), pad_token_id=0,
        attention_mask=torch.ones_like(ids),
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("threshold", "candidates", "lookahead"),
    [(math.inf, 3, 5), (0.0, 1, 5), (1.5, 1, 3), (0.0, 3, 0), (1.5, 5, 0)],
)
def test_it_is_greedy_decoding_where_nothing_is_weighed(
    tiny_llama: PreTrainedModel, threshold: float, candidates: int, lookahead: int
) -> None:
    decode = AdaDec(Session(tiny_llama), threshold, candidates, lookahead)
    for prompt in PROMPTS:
        assert decode.generate(prompt, 12, STOPS).token_ids == greedy(tiny_llama, prompt, 12)


def plainly(
    model: PreTrainedModel, prompt: list[int], length: int, tau: float, candidates: int, lookahead: int
) -> tuple[list[int], list[list[float]]]:
    """The method as it is written down: no cache, no tree, nothing run ahead. Tokens, and scores at pauses."""

    def log_p(ids: list[int]) -> torch.Tensor:
        return torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].float(), -1)

    new: list[int] = []
    scores: list[list[float]] = []
    with torch.inference_mode():
        while len(new) < length and not (new and new[-1] in STOPS):
            here = log_p(prompt + new)
            if float(-(here.exp() * here).sum()) < tau:
                new.append(int(here.argmax()))
                continue
            tried = here.topk(candidates).indices.tolist()
            found = []
            for token in tried:
                text, total, count = [*new, token], float(here[token]), 0
                while count < lookahead and text[-1] not in STOPS:
                    ahead = log_p(prompt + text)
                    total += float(ahead.max())
                    text.append(int(ahead.argmax()))
                    count += 1
                found.append(total / (count + 1))
            scores.append(found)
            new.append(tried[max(range(candidates), key=lambda n: found[n])])
    return new, scores


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("tau", [0.0, 1.0, 2.0])
def test_it_is_the_method_as_written_down(kind: str, tau: float) -> None:
    model = tiny_model(kind)
    decode = AdaDec(Session(model), tau, 3, 3)
    changed = 0
    for prompt in PROMPTS:
        tokens, scores = plainly(model, prompt, 8, tau, 3, 3)
        found = decode.generate(prompt, 8, STOPS)
        assert found.token_ids == tokens
        paused = [[c.score for c in step.candidates] for step in found.steps if step.candidates]
        assert len(paused) == len(scores)
        for own, plain in zip(paused, scores, strict=True):
            assert own == pytest.approx(plain, abs=1e-4)
        changed += sum(step.rank > 0 for step in found.steps)
        assert decode.session.tokens[len(prompt) :] == tokens[: len(decode.session.tokens) - len(prompt)]
    assert changed, "no pause changed anything, so nothing was tested"


def automaton(first: dict[int, float], then: dict[int, dict[int, float]]) -> ToyTarget:
    """Six tokens: 0 is the prompt's, 5 the end; conditionals as given, and the end for certain elsewhere."""
    target = ToyTarget(6)
    target.table = torch.full((6, 6), -torch.inf)
    for token, row in {0: first, **then}.items():
        for after, p in row.items():
            target.table[token, after] = math.log(p)
    for token in range(6):
        if target.table[token].isinf().all():
            target.table[token, 5] = 0.0
    return target


A, B, C, D, END = 1, 2, 3, 4, 5
HESITANT = {A: {C: 0.4, D: 0.35, END: 0.25}, B: {D: 1.0}, C: {C: 0.6, D: 0.4}}


def test_a_hesitant_path_is_left_for_a_sure_one() -> None:
    target = automaton({A: 0.51, B: 0.49}, HESITANT)
    h = float(entropy(target.table[0]))
    assert h == pytest.approx(-0.51 * math.log(0.51) - 0.49 * math.log(0.49))
    sure = AdaDec(target, h - 0.01, 2, 3).generate([0], 4, [END])
    assert sure.token_ids == [B, D, END]
    assert AdaDec(target, h + 0.01, 2, 3).generate([0], 1, [END]).token_ids == [A]
    assert AdaDec(target, h, 2, 3).generate([0], 1, [END]).token_ids == [B], "at the threshold it pauses"
    first = sure.steps[0]
    assert [c.token for c in first.candidates] == [A, B]
    hesitant = (math.log(0.51) + math.log(0.4) + 2 * math.log(0.6)) / 4
    assert first.candidates[0].score == pytest.approx(hesitant, abs=1e-5)
    # B, D, END: the branch ends after two tokens ahead, and those are what its mean is over.
    assert first.candidates[1].ahead == 2
    assert first.candidates[1].score == pytest.approx(math.log(0.49) / 3, abs=1e-5)
    assert first.rank == 1


def test_a_candidate_that_ends_at_once_has_its_own_probability_as_score() -> None:
    target = automaton({A: 0.6, END: 0.4}, HESITANT)
    step = AdaDec(target, 0.0, 2, 3).generate([0], 1, [END]).steps[0]
    assert (step.candidates[1].token, step.candidates[1].ahead) == (END, 0)
    assert step.candidates[1].score == pytest.approx(math.log(0.4))
    by_rule = AdaDec(target, 0.0, 2, 3).generate([0], 1, stop=lambda ids: ids[-1] in (A, END)).steps[0]
    assert [c.ahead for c in by_rule.candidates] == [0, 0]


def test_passes_are_counted_exactly(tiny_llama: PreTrainedModel) -> None:
    calls: list[int] = []

    class Counting(Session):
        def _forward(self, tree, keep_logits):  # type: ignore[no-untyped-def]
            calls.append(len(tree))
            return super()._forward(tree, keep_logits)

    session = Counting(tiny_llama)
    for threshold in (0.0, 1.0, 2.0, math.inf):
        calls.clear()
        found = AdaDec(session, threshold, 3, 4).generate(PROMPTS[0], 12)
        assert found.target_passes == len(calls)
        assert found.nodes == sum(calls) - len(PROMPTS[0])
        if threshold == 0.0:
            assert found.pause_rate == 1
            assert found.target_passes == 1 + 12 * 4, "the prompt, and four for every token"
        if threshold == math.inf:
            assert found.target_passes == 12


def test_pauses_become_fewer_as_the_threshold_rises(tiny_llama: PreTrainedModel) -> None:
    """On one and the same text, that is: what a pause changes changes the entropies after it."""
    session = Session(tiny_llama)
    rates = [
        AdaDec(session, tau, 1, 2).generate(PROMPTS[1], 20).pause_rate for tau in (-1.0, 0.0, 1.0, 2.0, 3.0, 99.0)
    ]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[-1]) == (1.0, 0.0)
    assert len(set(rates)) > 2


def test_a_decision_is_made_once_a_token_and_told_at_once(tiny_llama: PreTrainedModel) -> None:
    told: list[list[int]] = []
    asked: list[float] = []

    def pause(unsure: float) -> bool:
        asked.append(unsure)
        return len(asked) % 2 == 0

    found = AdaDec(Session(tiny_llama), pause, 3, 4).generate(PROMPTS[2], 9, on_tokens=told.append)
    assert told == [[token] for token in found.token_ids]
    assert asked == [step.entropy for step in found.steps]
    assert [bool(step.candidates) for step in found.steps] == [False, True] * 4 + [False]
    assert any(step.free for step in found.steps)


def test_the_context_is_not_overrun(tiny_llama: PreTrainedModel) -> None:
    session = Session(tiny_llama, max_length=12)
    found = AdaDec(session, 0.0, 3, 5).generate(PROMPTS[0], 50)
    assert found.finish_reason == "context"
    assert len(found.token_ids) == 12 - 5 + 1
    longer = AdaDec(Session(tiny_llama), 0.0, 3, 5).generate(PROMPTS[0], 3)
    assert found.token_ids[:3] == longer.token_ids


def test_entropy_has_its_bounds() -> None:
    logits = torch.randn(20, 7, generator=torch.Generator().manual_seed(0)) * 3
    h = entropy(logits)
    assert bool(((h >= 0) & (h <= math.log(7))).all())
    assert torch.allclose(h, entropy(logits + 100), atol=1e-4)
    assert float(entropy(torch.zeros(7))) == pytest.approx(math.log(7))
    assert float(entropy(torch.tensor([0.0, -torch.inf, -torch.inf]))) == 0


def synthetic(n: int, weight: float = -2.0, bias: float = 3.0, seed: int = 0) -> tuple[list[float], list[int]]:
    random = np.random.default_rng(seed)
    h = random.uniform(0, 3, n)
    right = random.random(n) < 1 / (1 + np.exp(-(weight * h + bias)))
    return h.tolist(), np.where(right, 1, random.integers(2, 9, n)).tolist()


def test_the_threshold_is_where_right_and_wrong_are_as_likely() -> None:
    found = fit_threshold(*synthetic(20_000))
    assert found.q == pytest.approx(0.5, abs=0.05)
    assert found.tau == pytest.approx(1.5, rel=0.1)
    assert found.weight == pytest.approx(-2, rel=0.1)
    assert 1 / (1 + math.exp(-(found.weight * found.tau + found.bias))) == pytest.approx(found.q)
    assert found == fit_threshold(*synthetic(20_000))
    grid = 1 / (1 + np.exp(2 * np.linspace(0, 3, 1000) - 3))
    pairs = (grid[:, None] * (1 - grid[None])) / (grid.sum() * (1 - grid).sum())
    assert found.auc == pytest.approx(float(np.triu(pairs, 1).sum()), abs=0.01)
    assert found.rescuable == pytest.approx(2 / 7, abs=0.03), "ranks 2 and 3 of 2 to 8"
    h = np.array(synthetic(20_000)[0])
    p = 1 / (1 + np.exp(-(found.weight * h + found.bias)))
    assert ((h >= found.tau) == (p <= found.q)).all()
    assert found.pause_rate == pytest.approx(float((h >= found.tau).mean()))


def test_the_cut_is_chosen_on_tokens_as_they_are() -> None:
    """Where most tokens are right, balancing the cut's tokens too would pause far too often."""
    h, ranks = synthetic(20_000)
    kept = [n for n in range(20_000) if ranks[n] == 1 or n % 6 == 0]
    found = fit_threshold([h[n] for n in kept], [ranks[n] for n in kept])
    # With five in six of the wrong tokens gone, a first choice is worth keeping up to ln(6) / 2 nats further.
    assert found.q < 0.3
    assert found.tau == pytest.approx(1.5 + math.log(6) / 2, rel=0.1)


def test_the_regression_is_the_usual_one() -> None:
    """Its gradient, penalty included, is zero where it stops."""
    from tokenworks.decode.adadec_threshold import _regress

    h, ranks = (np.array(each) for each in synthetic(300))
    weight, bias = _regress(h, ranks == 1)
    p = 1 / (1 + np.exp(-(weight * h + bias)))
    assert ((p - (ranks == 1)) * h).sum() + weight == pytest.approx(0, abs=1e-2)
    assert (p - (ranks == 1)).sum() == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize(
    ("entropies", "ranks", "said"),
    [
        ([1.0] * 60, [1] * 60, "always right or always wrong"),
        ([1.0] * 60, [2] * 60, "always right or always wrong"),
        ([1.0] * 9, [1] * 9, "too few"),
        ([math.nan] * 60, [1] * 60, "too few"),
        ([0.1, 2.0] * 50, [2, 1] * 50, "no surer where it is right"),
        ([1.0] * 60, [1] * 59, "60"),
    ],
)
def test_data_that_teach_nothing_are_refused(entropies: list[float], ranks: list[int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        fit_threshold(entropies, ranks)


def test_references_are_read_as_the_model_reads_them(tiny_llama: PreTrainedModel) -> None:
    prompt, reference = PROMPTS[0], PROMPTS[1] + PROMPTS[2]
    entropies, ranks = teacher_forced(Session(tiny_llama), prompt, reference)
    with torch.inference_mode():
        logits = tiny_llama(torch.tensor([prompt + reference])).logits[0, len(prompt) - 1 : -1]
    p = logits.softmax(-1)
    assert entropies == pytest.approx((-(p * p.log()).sum(-1)).tolist(), abs=1e-4)
    assert ranks == [1 + int((row > row[t]).sum()) for row, t in zip(logits, reference, strict=True)]


def test_long_references_are_read_in_chunks(tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = teacher_forced(Session(tiny_llama), PROMPTS[0], PROMPTS[1] + PROMPTS[2])
    for chunk in (1, 4, 5, 7):
        monkeypatch.setattr("tokenworks.core.session.PREFILL_CHUNK", chunk)
        found = teacher_forced(Session(tiny_llama), PROMPTS[0], PROMPTS[1] + PROMPTS[2])
        assert found[1] == whole[1]
        assert found[0] == pytest.approx(whole[0], abs=1e-4)


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    texts = ["def f(x):\n    return x + 1\n"] * 9
    return LoadedModel(tiny_model("llama", vocab_size=300), train_bpe(texts, 300), "tiny", "here")


def threshold(model: str = "tiny", dtype: str = "float32") -> EntropyThreshold:
    return EntropyThreshold(1.5, 0.5, -2.0, 3.0, 0.9, 0.8, 100, 0.7, 0.2, 0.4, model, dtype)


def test_thresholds_round_trip_and_belong_to_a_model(tiny: LoadedModel, tmp_path: Path) -> None:
    threshold().save(tmp_path / "t.json")
    assert load_threshold(tiny, tmp_path / "t.json") == threshold()
    for other in (threshold("larger"), threshold(dtype="float16")):
        other.save(tmp_path / "t.json")
        with pytest.raises(InputError, match="learn one for this model"):
            load_threshold(tiny, tmp_path / "t.json")
    with pytest.raises(InputError, match="none comes with tokenworks for tiny"):
        load_threshold(tiny)
    (tmp_path / "t.json").write_text("{}")
    for path in ("t.json", "missing.json"):
        with pytest.raises(InputError, match="not a saved entropy threshold"):
            load_threshold(tiny, tmp_path / path)


def test_the_one_that_is_shipped_is_for_its_model() -> None:
    found = load_threshold(LoadedModel(tiny_model("llama"), None, "smollm2-135m", ""))  # type: ignore[arg-type]
    assert 0 < found.tau < 4
    assert found.auc > 0.75
    assert "calibrate" in found.made_by


def test_learning_reads_pairs(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []

    def fit(entropies: list[float], ranks: list[int], seed: int) -> EntropyThreshold:
        given.extend(ranks)
        return threshold("", "")

    monkeypatch.setattr("tokenworks.decode.adadec_threshold.fit_threshold", fit)
    pair = ("def f(x):", "\n    return x + 1\n")
    found = learn_threshold(tiny, [pair, pair], made_by="this test")
    assert (found.model, found.dtype, found.made_by) == ("tiny", "float32", "this test")
    assert len(given) == 2 * len(tiny.tokenizer(pair[1])["input_ids"])
    assert given[: len(given) // 2] == given[len(given) // 2 :]
    with pytest.raises(InputError, match="number 1 has an empty"):
        learn_threshold(tiny, [pair, ("x", "")])


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("\n    return x", False),
        ("\n    return x\n\n", False),
        ("\n    return x\n\ndef", True),
        ("\n    a\n\n\n\n", True),
        ("\n\treturn x\n", False),
        ("```", True),
        ("", False),
    ],
)
def test_leaving_a_function(text: str, left: bool) -> None:
    assert left_function(text) == left


def test_a_body_ends_where_the_function_is_left() -> None:
    assert function_body("\n    return x\n\ndef g():\n    pass") == "\n    return x\n"
    assert function_body("\n    return x") == "\n    return x\n"


def test_text_rules_see_only_the_new_text(tiny: LoadedModel) -> None:
    seen: list[str] = []
    rule = stop_on_text(tiny.tokenizer, lambda text: bool(seen.append(text)) or len(text) > 3)
    found = AdaDec(Session(tiny.model), math.inf).generate(tiny.tokenizer("def f")["input_ids"], 20, stop=rule)
    assert found.finish_reason == "stop"
    assert seen[-1] == tiny.tokenizer.decode(found.token_ids, skip_special_tokens=True)
    assert all(len(text) <= 3 for text in seen[:-1])


def test_random_pauses_come_at_their_rate() -> None:
    pause = random_pauses(0.3, 1)
    assert 0.27 < sum(pause(9.9) for _ in range(4000)) / 4000 < 0.33
    assert [random_pauses(0.5, 2)(0.0) for _ in range(3)] == [random_pauses(0.5, 2)(9.0) for _ in range(3)]


def test_the_trace_shows_what_was_weighed(tiny: LoadedModel) -> None:
    found = AdaDec(Session(tiny.model), 0.0, 2, 2).generate(tiny.tokenizer("def f")["input_ids"], 6)
    trace = found.trace(tiny.tokenizer)
    assert set(trace.channels) == {"decision", "entropy", "probability", "candidates", "run ahead"}
    assert set(trace.channels["decision"].values) <= {"kept", "changed"}
    assert all("(2)" in text for text in trace.channels["candidates"].values)
    plain = AdaDec(Session(tiny.model), math.inf).generate([5], 3).trace(tiny.tokenizer)
    assert plain.channels["decision"].values == ["greedy"] * 3
    assert plain.channels["candidates"].values == [None] * 3
    assert AdaDecGeneration().pause_rate == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"candidates": 0}, "candidates: 0"),
        ({"candidates": 98}, "candidates: 98"),
        ({"lookahead": -1}, "lookahead: -1"),
        ({"threshold": math.nan}, "threshold: NaN"),
    ],
)
def test_misuse(tiny_llama: PreTrainedModel, arguments: dict[str, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        AdaDec(Session(tiny_llama), **{"threshold": 1.0, **arguments})  # type: ignore[arg-type]


def test_misuse_of_generate(tiny_llama: PreTrainedModel) -> None:
    decode = AdaDec(Session(tiny_llama), 1.0)
    with pytest.raises(InputError, match="max_new_tokens"):
        decode.generate([1], 0)
    with pytest.raises(InputError, match="empty"):
        decode.generate([])
    with pytest.raises(InputError, match="sequence"):
        decode.generate(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(InputError, match="rate"):
        random_pauses(1.1)
