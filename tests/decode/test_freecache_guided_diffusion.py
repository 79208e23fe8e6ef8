"""FreeCache and guided diffusion: exact where it must be, and the guide never writes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tokenworks.core.errors import InputError
from tokenworks.core.session import Session, SlotCache
from tokenworks.decode import freecache_guided_diffusion as module
from tokenworks.decode.diffusion import Diffusion, generate_diffusion, transfer_counts
from tokenworks.decode.freecache_guided_diffusion import CHUNK, FreeCache, Policy, accepts, generate_guided
from tokenworks.decode.masked_diffusion import BidirectionalLlama

POLICIES: tuple[Policy, ...] = ("prompt", "block", "aggressive", "sliding")
PROMPT = [3, 5, 7, 2, 9, 4]


def llama(layers: int, seed: int = 0) -> LlamaForCausalLM:
    """A random model whose first choices are no accident of rounding."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=29, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.4 if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1)
            )
    return model


class CausalLlama(BidirectionalLlama):
    """A model to which nothing that comes later matters: its keys and values never change."""

    def _bias(self, start: int, end: int) -> Tensor:
        seen = torch.arange(end) <= torch.arange(start, end)[:, None]
        return torch.zeros(1, 1, end - start, end).masked_fill(~seen, torch.finfo(torch.float32).min)


def same(one: Diffusion, other: Diffusion) -> bool:
    return one.token_ids == other.token_ids and one.unmasked_per_step == other.unmasked_per_step


@pytest.mark.parametrize("shifted", [False, True])
def test_with_nothing_frozen_it_is_the_plain_sampler(shifted: bool) -> None:
    """Against a sampler written out here, without any cache."""
    model = llama(3)
    found = generate_diffusion(FreeCache(BidirectionalLlama(model, 0, shifted), "none"), PROMPT, 12, steps=6)
    ids = torch.tensor(PROMPT + [0] * 12)
    for _ in range(6):
        with torch.no_grad():
            logits = model(input_ids=ids[None], attention_mask=torch.zeros(1, 1, 18, 18)).logits[0]
        if shifted:
            logits = torch.cat([logits[:1], logits[:-1]])
        logits[:, 0] = -torch.inf
        best = torch.softmax(logits, -1).max(-1)
        sure = best.values.masked_fill(ids != 0, -1)
        for slot in sure.topk(2).indices:
            ids[slot] = best.indices[slot]
    assert found.token_ids == ids[6:].tolist()
    assert found.unmasked_per_step == [2] * 6


@pytest.mark.parametrize(("policy", "shifted", "layers"), itertools.product(POLICIES, (False, True), (1, 3)))
def test_it_is_exact_where_keys_and_values_do_not_change(policy: Policy, shifted: bool, layers: int) -> None:
    """A single layer's depend on the own token only; a causal model's on what came before."""
    kind = BidirectionalLlama if layers == 1 else CausalLlama
    model, guide = kind(llama(layers), 0, shifted), Session(llama(2, seed=1))
    plain, frozen = FreeCache(model, "none"), FreeCache(model, policy, block=4, window=3)
    for block in (4, 16):
        assert same(
            generate_diffusion(frozen, PROMPT, 16, 8, block), generate_diffusion(plain, PROMPT, 16, 8, block)
        )
        assert frozen.tokens_fed < plain.tokens_fed
    for rule in ("deterministic", "topk"):
        one, other = (generate_guided(cache, guide, PROMPT, 16, rule, 4) for cache in (frozen, plain))  # type: ignore[arg-type]
        assert same(one, other)


def test_freezing_early_is_not_exact() -> None:
    """As the official code does it: a block is frozen by the pass that still saw masks in it."""
    model = BidirectionalLlama(llama(1), 0)
    plain = generate_diffusion(FreeCache(model, "none"), PROMPT, 24, 8, 6)
    early = generate_diffusion(FreeCache(model, "block", block=6, freeze_early=True), PROMPT, 24, 8, 6)
    assert plain.token_ids != early.token_ids


def test_refreshing_at_every_step_or_a_window_of_everything_changes_nothing() -> None:
    model = BidirectionalLlama(llama(3), 0)
    plain = generate_diffusion(FreeCache(model, "none"), PROMPT, 16, 16, 4)
    assert same(generate_diffusion(FreeCache(model, "block", 4, refresh_interval=1), PROMPT, 16, 16, 4), plain)
    assert same(generate_diffusion(FreeCache(model, "sliding", window=99), PROMPT, 16, 16, 4), plain)


def test_a_longer_window_errs_less() -> None:
    model = BidirectionalLlama(llama(3), 0)

    def error(window: int) -> float:
        total = 0.0
        for seed in range(6):
            text = torch.randint(1, 29, (24,), generator=torch.Generator().manual_seed(seed))
            cache = FreeCache(model, "sliding", window=window)
            cache.start(4)
            for clean in range(8, 24, 2):
                ids = text.clone()
                ids[clean:] = 0
                begin, logits = cache.logits(ids)
                exact = model.logits(ids, 0, SlotCache())
                total += float((logits[clean - begin :] - exact[clean:]).abs().max())
        return total

    errors = [error(window) for window in (0, 4, 12, 24)]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-3


def test_the_work_is_what_was_cut_off() -> None:
    model = BidirectionalLlama(llama(1), 0)
    for block, each in ((4, 4), (8, 2)):
        cache = FreeCache(model, "block", block=block)
        found = generate_diffusion(cache, PROMPT, 16, 16 // block * each, block)
        length, expected, clean = len(PROMPT) + 16, 0, len(PROMPT)
        for number in range(16 // block):
            for step in range(each):
                # The tokens of a block that are written in its last step are frozen one pass later.
                settled = clean if step or not number else clean - block
                expected += length - (0 if not (number or step) else settled)
            clean += block
        assert cache.tokens_fed == found.tokens_fed == expected
    prompt = FreeCache(model, "prompt")
    generate_diffusion(prompt, PROMPT, 16)
    assert prompt.tokens_fed == len(PROMPT) + 16 * 16
    shifted = FreeCache(BidirectionalLlama(llama(1), 0, shifted=True), "prompt")
    generate_diffusion(shifted, PROMPT, 16)
    assert shifted.tokens_fed == prompt.tokens_fed + 15, "one more position, for the first slot's prediction"


# The guide.


@pytest.mark.parametrize("shifted", [False, True])
def test_every_token_is_the_diffusion_models_own_first_choice(shifted: bool) -> None:
    model, guide = BidirectionalLlama(llama(3), 0, shifted), Session(llama(2, seed=1))
    for rule in ("deterministic", "topk-relative", "topk", "threshold", "sampled"):
        cache, seen = FreeCache(model, "none"), []
        found = generate_guided(cache, guide, PROMPT, 20, rule, 3, 0.2, seed=0, on_tokens=seen.append)  # type: ignore[arg-type]
        assert found.steps <= 20
        assert sum(found.unmasked_per_step) == 20
        assert min(found.unmasked_per_step) >= 1
        ids = torch.tensor(PROMPT + [0] * 20)
        for new in seen:
            assert [position for position, _ in new] == list(range(new[0][0], new[0][0] + len(new)))
            assert int((ids == 0).nonzero()[0]) == 6 + new[0][0], "what is clean is a prefix"
            fresh = FreeCache(model, "none")
            fresh.start(len(PROMPT))
            begin, logits = fresh.logits(ids)
            logits[:, 0] = -torch.inf
            for position, token in new:
                assert int(logits[6 + position - begin].argmax()) == token
                ids[6 + position] = token


def always(answer: bool) -> Callable[..., bool]:
    return lambda *_: answer


def test_a_guide_that_always_or_never_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    model, guide, length = BidirectionalLlama(llama(3), 0), Session(llama(2, seed=1)), 2 * CHUNK + 5
    monkeypatch.setattr(module, "accepts", always(True))
    at_once = generate_guided(FreeCache(model, "none"), guide, PROMPT, length)
    assert at_once.unmasked_per_step == [length]
    assert at_once.guide_calls == 4  # the prompt, and three chunks
    logits = model.logits(torch.tensor(PROMPT + [0] * length), 0, SlotCache())
    logits[:, 0] = -torch.inf
    assert at_once.token_ids == logits[6:].argmax(-1).tolist()
    monkeypatch.setattr(module, "accepts", always(False))
    one_by_one = generate_guided(FreeCache(model, "none"), guide, PROMPT, 12)
    assert one_by_one.unmasked_per_step == [1] * 12
    assert {u.source for u in one_by_one.unmasked if u} == {"free"}
    blocks_of_one = generate_diffusion(FreeCache(model, "none"), PROMPT, 12, 12, 1)
    assert one_by_one.token_ids == blocks_of_one.token_ids


def test_a_guide_that_is_the_model_itself_gives_greedy_decoding() -> None:
    """A causal diffusion model's proposals depend on masks to their left; once those are gone it is the guide."""
    model = llama(2)
    found = generate_guided(
        FreeCache(CausalLlama(model, 0, shifted=True), "none"), Session(model), PROMPT, 12, "deterministic"
    )
    with torch.no_grad():
        ids = list(PROMPT)
        for _ in range(12):
            logits = model(torch.tensor([ids])).logits[0, -1]
            logits[0] = -torch.inf
            ids.append(int(logits.argmax()))
    assert found.token_ids == ids[6:]


def test_the_guides_cache_is_that_of_a_fresh_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, net = BidirectionalLlama(llama(3), 0), llama(2, seed=1)
    guide, chance = Session(net), torch.Generator().manual_seed(0)
    monkeypatch.setattr(module, "accepts", lambda *_: bool(torch.rand((), generator=chance) < 0.7))
    texts = []
    original = module._guided

    def watched(state, guide, *rest):  # type: ignore[no-untyped-def]
        found = original(state, guide, *rest)
        texts.append(len(guide.tokens))
        fresh = Session(net)
        fresh.prefill(guide.tokens)
        for (k, v), (other_k, other_v) in zip(guide.cached(), fresh.cached(), strict=True):
            assert torch.allclose(k, other_k, atol=1e-4)
            assert torch.allclose(v, other_v, atol=1e-4)
        return found

    monkeypatch.setattr(module, "_guided", watched)
    generate_guided(FreeCache(model, "none"), guide, PROMPT, 40)
    assert len(texts) > 5


def test_rules() -> None:
    q = torch.tensor([0.1, 0.5, 0.3, 0.06, 0.04])
    assert [accepts(q, token, "deterministic") for token in range(5)] == [False, True, False, False, False]
    assert [accepts(q, token, "topk", 3) for token in range(5)] == [True, True, True, False, False]
    assert [accepts(q, token, "topk-relative", 2, 0.5) for token in range(5)] == [False, True, True, False, False]
    assert [accepts(q, token, "topk-relative", 2, 0.7) for token in range(5)] == [False, True, False, False, False]
    assert [accepts(q, token, "threshold", 2, 0.09) for token in range(5)] == [True, True, True, False, False]
    chance = torch.Generator().manual_seed(0)
    rate = sum(accepts(q, 1, "sampled", chance=chance) for _ in range(2000)) / 2000
    assert rate == pytest.approx(0.5, abs=0.04)
    for seed in range(20):
        p = torch.softmax(torch.randn(9, generator=torch.Generator().manual_seed(seed)), -1)
        for token in range(9):
            assert accepts(p, token, "topk-relative", 1, 0.5) == accepts(p, token, "deterministic")
            looser = [accepts(p, token, "topk-relative", k, ratio) for k, ratio in ((1, 0.9), (2, 0.5), (4, 0.1))]
            assert looser == sorted(looser)


def test_nothing_but_the_end_comes_after_the_end() -> None:
    model, guide = BidirectionalLlama(llama(3), 0), Session(llama(2, seed=1))
    free = generate_guided(FreeCache(model, "none"), guide, PROMPT, 16)
    stop = free.token_ids[5]
    at = free.token_ids.index(stop)
    found = generate_guided(FreeCache(model, "none"), guide, PROMPT, 16, stop_ids=[stop])
    assert found.token_ids[: at + 1] == free.token_ids[: at + 1]
    assert found.token_ids[at:] == [stop] * (16 - at)
    assert found.unmasked[at + 1 :] == [None] * (15 - at)


# The plain samplers.


def test_every_slot_is_unmasked_once() -> None:
    for masked, steps in ((16, 16), (16, 5), (7, 3), (1, 1)):
        even = transfer_counts(masked, steps)
        assert sum(even) == masked
        assert even == sorted(even, reverse=True)
        assert max(even) - min(even) <= 1
        assert sum(transfer_counts(masked, steps, "linear")) == masked
    assert transfer_counts(100, 4, "linear")[:2] == [24, 25]  # a quarter of all, rounded down, of what is left
    model = BidirectionalLlama(llama(2), 0)
    for kind in ("probability", "margin", "entropy", "random"):
        found = generate_diffusion(FreeCache(model, "none"), PROMPT, 10, 4, kind=kind, seed=1)  # type: ignore[arg-type]
        assert 0 not in found.token_ids
        assert found.unmasked_per_step == [3, 3, 2, 2]
        assert found.steps == 4


def test_clear_errors() -> None:
    model, guide = BidirectionalLlama(llama(1), 0), Session(llama(1))
    cache = FreeCache(model, "none")
    with pytest.raises(InputError, match="policy: there is no 'other'"):
        FreeCache(model, "other")  # type: ignore[arg-type]
    for numbers in ({"block": 0}, {"window": -1}, {"refresh_interval": 0}):
        with pytest.raises(InputError, match="block: "):
            FreeCache(model, "block", **numbers)
    for prompt in ([], [[1, 2]], [1.5]):
        with pytest.raises(InputError, match="prompt: expected one sequence"):
            generate_diffusion(cache, torch.tensor(prompt), 4)
    for prompt in ([1, 29], [1, 0], [-1]):
        with pytest.raises(InputError, match="prompt: an id"):
            generate_diffusion(cache, prompt, 4)
    with pytest.raises(InputError, match="length: 0"):
        generate_guided(cache, guide, PROMPT, 0)
    with pytest.raises(InputError, match="block: 5 does not divide the length of 12"):
        generate_diffusion(cache, PROMPT, 12, block=5)
    for steps, block in ((5, 6), (13, 12), (1, 6)):
        with pytest.raises(InputError, match="steps: "):
            generate_diffusion(cache, PROMPT, 12, steps, block)
    with pytest.raises(InputError, match="kind: "):
        generate_diffusion(cache, PROMPT, 12, kind="other")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rule: there is no 'other'"):
        generate_guided(cache, guide, PROMPT, 4, "other")  # type: ignore[arg-type]
    from tests.conftest import tiny_model

    with pytest.raises(InputError, match="guide: its vocabulary has 97 tokens and the diffusion model's 29"):
        generate_guided(cache, Session(tiny_model("llama")), PROMPT, 4)
