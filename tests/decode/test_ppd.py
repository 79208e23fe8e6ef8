"""Parallel prompt decoding: the guarantees of its dossier, each an assertion that could fail."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.conftest import tiny_model
from tokenworks.core.corpus import train_bpe
from tokenworks.core.cost import CostCurve
from tokenworks.core.data import prompts
from tokenworks.core.errors import InputError
from tokenworks.core.measure import goodness_of_fit
from tokenworks.core.models import load
from tokenworks.core.sampling import Sampling
from tokenworks.core.selftext import SelfText
from tokenworks.core.session import Session
from tokenworks.core.text import encode_prompt, stop_ids
from tokenworks.core.tree import ROOT, TokenTree
from tokenworks.decode import ppd_training as training
from tokenworks.decode.contract import Draft, Verdict
from tokenworks.decode.ppd import (
    BUDGETS,
    Floats,
    PromptTokens,
    RankPath,
    _Search,
    choose_budget,
    dynamic_trees,
)
from tokenworks.decode.ppd_training import (
    GreedyText,
    TrainedPrompts,
    divergence,
    frozen,
    load_prompt_tokens,
    measure_accuracy,
    prompt_guess,
    prompt_logits,
    save_prompt_tokens,
    train_prompt_tokens,
)
from tokenworks.decode.speculative import SpeculativeDecoder
from tokenworks.testing import check_drafter


def table(prompts: int, ranks: int, seed: int = 0) -> Floats:
    """Accuracies that fall with the rank, as measured ones do."""
    rows = np.random.default_rng(seed).dirichlet(np.full(ranks + 1, 0.4), prompts)[:, :ranks]
    return np.sort(rows, axis=1)[:, ::-1]


def random_embeddings(count: int, width: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def prompted(model: PreTrainedModel, embeddings: Tensor, max_length: int | None = None) -> Session:
    """A session to which the prompts have been added."""
    session = Session(model, max_length)
    session.add_inputs(embeddings)
    return session


# Decoding: the text is the target's own.


@pytest.mark.parametrize(
    ("kind", "budget"),
    [("llama", 1), ("llama", 6), ("llama", 40), ("gemma2", 40), ("gemma3_text", 12), ("gpt2", 40)],
)
def test_greedy_text_is_the_models_own_whatever_is_put_in(kind: str, budget: int) -> None:
    model = tiny_model(kind, dtype=torch.float64, vocab_size=12)
    session = prompted(model, 7 * random_embeddings(3, seed=budget))
    drafter = PromptTokens(12, table(3, 6, seed=budget), budget)
    check_drafter(drafter, session)
    found = SpeculativeDecoder(session, drafter).generate([1, 2, 3], 40)
    assert session.tokens == [1, 2, 3, *found.token_ids[:-1]][: session.length], "no prompt is kept"
    # A vocabulary of 12 is small enough for the guesses of random prompts to be right now and then.
    assert (max(found.accepted) > 1) == (budget > 1)


def test_the_context_is_filled_to_the_last_slot() -> None:
    model = tiny_model("llama", vocab_size=12)
    session = prompted(model, random_embeddings(3), max_length=20)
    check_drafter(PromptTokens(12, table(3, 6), 40), session, [[1, 2, 3]], max_new_tokens=40)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.5), Sampling(1.3, top_p=0.9)])
def test_sampling_follows_the_exact_distribution(sampling: Sampling) -> None:
    model, length = tiny_model("llama", vocab_size=3), 4
    strings = torch.tensor(list(itertools.product(range(3), repeat=length)))
    with torch.no_grad():
        logits = model(torch.cat([torch.ones(len(strings), 1, dtype=torch.long), strings], 1)).logits[:, :-1]
    chances = sampling.distribution(logits).gather(2, strings[..., None])[..., 0].double().prod(1)
    drafter = PromptTokens(3, table(2, 3, seed=3), 12)
    decode = SpeculativeDecoder(prompted(model, random_embeddings(2)), drafter, sampling=sampling)
    torch.manual_seed(0)
    generations = [decode.generate([1], length) for _ in range(700)]
    assert any(max(generation.accepted) > 1 for generation in generations), "the test is of accepted drafts too"
    counts = Counter(tuple(generation.token_ids) for generation in generations)
    possible = chances > 0
    assert all(found for string, found in zip(strings.tolist(), possible, strict=True) if tuple(string) in counts)
    kept = [counts[tuple(string)] for string in strings[possible].tolist()]
    test = goodness_of_fit(kept, chances[possible] / chances.sum(), effect=0.2)
    assert test.passed, str(test)
    assert test.power > 0.9


def test_prompts_never_influence_real_tokens() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    real = TokenTree.of([5, 6, 7, 8], [ROOT, 0, 0, 1])
    hung = TokenTree.of([5, 6, 7, 8, 97, 98, 97, 97], [ROOT, 0, 0, 1, 0, 4, 1, 3])
    found = []
    for seed, tree in ((0, real), (0, hung), (1, hung)):
        session = prompted(model, random_embeddings(2, seed=seed).double())
        session.prefill([1, 2, 3])
        found.append(session.extend(tree))
        session.commit([0, 1, 3])
        found[-1] = torch.cat([found[-1][:4], session.extend([9])])
    assert all(float((other - found[0]).abs().max()) < 1e-6 for other in found[1:])


def test_the_drafts_prompts_say_what_training_taught_them() -> None:
    """In a tree, a chain of prompts has the positions and sees the tokens that it has and sees in training."""
    for kind in ("llama", "gemma2", "gpt2"):
        model = tiny_model(kind) if kind != "gemma2" else tiny_model(kind, sliding_window=64)
        embeddings, tokens = random_embeddings(3), torch.tensor([[1, 2, 3, 4, 5, 6]])
        expected = prompt_logits(frozen(model), embeddings, 3, tokens, torch.tensor([[4]]))[0, 0]
        session = prompted(model, embeddings)
        session.prefill([1, 2, 3])
        decoder_head = session.extend(TokenTree.of([4, 9, 5, 97, 98, 99], [ROOT, 0, 0, 2, 3, 4]))[3:]
        if kind == "gemma2":  # the head's soft cap, which training leaves out on both sides
            expected = 30 * torch.tanh(expected / 30)
        assert torch.allclose(decoder_head, expected, atol=1e-4), kind


def test_guesses_stand_on_levels_by_rank_and_the_last_accepted_node_decides_the_state() -> None:
    drafter = PromptTokens(50, [[0.5, 0.3], [0.5, 0.3]], 16)
    drafter.start([1], Sampling(), None)
    first = drafter.propose([1, 2], 9)
    assert first.tree.tokens.tolist() == [2, 50, 51]
    assert first.tree.shape.parents == (ROOT, 0, 1)
    logits = torch.zeros(3, 50)
    logits[1, [7, 8]], logits[2, [9, 4]] = torch.tensor([2.0, 1.0]), torch.tensor([2.0, 1.0])
    drafter.observe(first, logits, Verdict([0], 3, []))
    second = drafter.propose([1, 2, 3], 9).tree
    for path, count in zip([(), *drafter.trees.trees[2].paths], drafter.trees.trees[2].prompts, strict=True):
        node = 0
        for level, rank in enumerate(path):
            wanted = ((7, 8), (9, 4))[level][rank]
            node = next(c for c in second.shape.children[node] if int(second.tokens[c]) == wanted)
        chain = [c for c in second.shape.children[node] if int(second.tokens[c]) >= 50]
        assert len(chain) == min(count, 1)
    node = next(c for c in second.shape.children[0] if int(second.tokens[c]) == 7)
    drafter.observe(Draft(second), torch.randn(len(second), 50), Verdict([0, node], 3, [1.0]))
    count = drafter.trees.trees[2].prompts[1 + drafter.trees.trees[2].paths.index((0,))]
    after = drafter.propose([1, 2, 3, 7, 3], 9).tree
    assert len(after) == len(drafter.trees.trees[count])
    cut = drafter.propose([1, 2, 3, 7, 3], 1).tree
    assert int(cut.shape.depths.max()) == 1
    assert len(drafter.propose([1, 2, 3, 7, 3], 0).tree) == 1


# Trees: what is drafted.


def accepted(paths: Sequence[RankPath], accuracy: Floats) -> float:
    return sum(float(np.prod([accuracy[level, rank] for level, rank in enumerate(path)])) for path in paths)


def test_no_set_of_candidates_is_better() -> None:
    nodes = [*itertools.product(range(3)), *itertools.product(range(3), repeat=2)]
    for seed, size in itertools.product(range(3), range(1, 7)):
        accuracy = table(2, 3, seed)
        closed = (
            chosen
            for chosen in itertools.combinations(nodes, size)
            if all(p[:-1] in chosen or len(p) == 1 for p in chosen)
        )
        best = max(accepted(chosen, accuracy) for chosen in closed)
        found = _Search(accuracy, 20).trees([min(size, 3), size])
        assert found.accepted[2] == pytest.approx(best)
        assert accepted(found.trees[2].paths, accuracy) == pytest.approx(best)


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 8])
def test_the_search_finds_the_best_numbers_of_candidates(budget: int) -> None:
    for seed in range(4):
        accuracy = table(2, 5, seed)
        sizes = itertools.product(range(budget), repeat=2)
        best = max(_Search(accuracy, budget).trees(each).tokens_per_pass for each in sizes)
        found = dynamic_trees(accuracy, budget).tokens_per_pass
        assert found <= best + 1e-9
        assert found - 1 >= 0.95 * (best - 1)  # it changes one number at a time, which may stop a little short


def test_chances_and_transitions_are_those_of_a_markov_chain() -> None:
    for seed, budget in itertools.product(range(3), (1, 4, 12, 30)):
        found = dynamic_trees(table(3, 10, seed), budget)
        for tree in found.trees:
            assert len(tree) <= budget
            assert sum(tree.last) == pytest.approx(1)  # the root's is the chance that no guess is accepted
            assert min(tree.last) >= 0
            assert max(tree.prompts) <= 3
        assert found.transitions.sum(1) == pytest.approx(1)
        assert found.stationary @ found.transitions == pytest.approx(found.stationary)
        assert found.stationary.sum() == pytest.approx(1)


def test_prompts_are_taken_where_they_are_worth_least() -> None:
    """One at a time, as the paper does it, gives the same trees as the sorted list."""
    accuracy = table(3, 6, seed=4)
    found = _Search(accuracy, 14).trees([4, 5, 5])
    for tree in found.trees:
        counts = [3] * len(tree.last)
        while len(counts) + sum(counts) > 14:
            loss = {
                node: q * (found.accepted[c] - found.accepted[c - 1])
                for node, (q, c) in enumerate(zip(tree.last, counts, strict=True))
                if c
            }
            counts[min(loss, key=lambda node: loss[node])] -= 1
        assert tree.prompts == tuple(counts)


@pytest.mark.parametrize("budget", [4, 10, 40])
def test_a_simulation_accepts_what_is_predicted(budget: int) -> None:
    accuracy = table(3, 6, seed=budget)
    found, random = dynamic_trees(accuracy, budget), np.random.default_rng(0)
    prompts_of = [dict(zip([(), *tree.paths], tree.prompts, strict=True)) for tree in found.trees]
    steps = 200_000
    # Rank 6 stands for a token that is not among the six guesses.
    ranks = np.stack([random.choice(7, steps, p=[*row, 1 - row.sum()]) for row in accuracy], axis=1).tolist()
    state = total = 0
    for truth in ranks:
        path: RankPath = ()
        while len(path) < 3 and (*path, truth[len(path)]) in prompts_of[state]:
            path = (*path, truth[len(path)])
        total += 1 + len(path)
        state = prompts_of[state][path]
    assert total / steps == pytest.approx(found.tokens_per_pass, rel=0.01)


def test_more_slots_never_confirm_less() -> None:
    for seed in range(3):
        accuracy = table(3, 10, seed)
        gains = [dynamic_trees(accuracy, budget).tokens_per_pass for budget in BUDGETS[:18]]
        assert gains == sorted(gains)
        for fewer, more in (([2, 4, 4], [2, 4, 9]), ([2, 4, 4], [3, 8, 4])):  # f grows with s ...
            assert (
                _Search(accuracy, 32).trees(fewer).accepted <= _Search(accuracy, 32).trees(more).accepted
            ).all()
        assert (np.diff(_Search(accuracy, 32).trees([9, 9, 9]).accepted) >= 0).all()  # ... and with k


def test_the_budget_follows_the_cost_curve() -> None:
    accuracy, budgets = table(3, 10, seed=1), (1, 4, 8, 16, 32)
    assert choose_budget(accuracy, CostCurve((1, 32), (1.0, 1.0)), budgets) == 32  # width is free
    assert choose_budget(accuracy, CostCurve((1, 32), (1.0, 32.0)), budgets) == 1  # width costs all it brings
    chosen = [
        choose_budget(accuracy, CostCurve((1, 33), (1.0, 1 + 32 * s)), budgets) for s in (0.001, 0.01, 0.03, 0.3)
    ]
    assert chosen == sorted(chosen, reverse=True)
    assert len(set(chosen)) > 2


@pytest.mark.parametrize(("accuracy", "budget"), [(table(3, 10), 1), (np.zeros((0, 10)), 9)])
def test_without_room_or_prompts_it_is_plain_decoding(accuracy: Floats, budget: int) -> None:
    drafter = PromptTokens(97, accuracy, budget)
    assert dynamic_trees(accuracy, budget).tokens_per_pass == 1
    for room in (0, 1, 9):
        assert len(drafter.propose([4], room).tree) == 1


def test_bad_tables_and_budgets_are_named() -> None:
    for accuracy in ([[0.9, 0.9]], [[-0.1, 0.2]], [0.2, 0.3]):
        with pytest.raises(InputError, match="accuracy"):
            dynamic_trees(accuracy, 9)
    with pytest.raises(InputError, match="budget: 0"):
        dynamic_trees(table(3, 10), 0)


# Training: what the prompts learn.


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return tiny_model("llama", seed=5, vocab_size=300)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(["Next 2 word, hello world, this is a tokenizer"] * 9, 290)


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    original = training.write_text
    monkeypatch.setattr(training, "write_text", lambda *args, seed: original(*args, length=24, seed=seed, rows=12))


def test_the_loss_is_zero_for_the_teacher_and_weighs_near_guesses_more() -> None:
    teacher = torch.randn(2, 5, 3, 40)
    assert float(divergence(teacher, teacher)) == pytest.approx(0, abs=1e-6)
    parts = []
    for prompt in range(3):
        student = teacher.clone()
        student[:, :, prompt] = teacher[:, :, prompt].flip(-1)
        q = torch.softmax(teacher[:, :, prompt], -1)
        alone = (q * (q.log() - torch.log_softmax(student[:, :, prompt], -1))).sum(-1).mean()
        parts.append(float(divergence(student, teacher) / alone))
    assert parts == pytest.approx([1 / 3, 0.8 / 3, 0.64 / 3])


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_many_groups_say_what_each_says_alone(kind: str) -> None:
    model = frozen(tiny_model(kind, **({"sliding_window": 64} if kind == "gemma2" else {})))
    tokens = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))
    places, embeddings = torch.tensor([[3, 8, 11, 3], [0, 5, 5, 10]]), random_embeddings(3)
    together = prompt_logits(model, embeddings, 3, tokens, places)
    teacher = torch.randn(together.shape)
    losses = []
    for row, group in itertools.product(range(2), range(4)):
        place = int(places[row, group])
        words = model.get_input_embeddings()(tokens[row, : place + 1])
        # No mask at all: one prompt's ensemble of one is causal.
        states = model.get_decoder()(inputs_embeds=torch.cat([words, embeddings])[None]).last_hidden_state
        alone = model.get_output_embeddings()(states[0, -3:])
        assert torch.allclose(together[row, group], alone, atol=1e-4)
        losses.append(float(divergence(alone, teacher[row, group])))
    assert float(divergence(together, teacher)) == pytest.approx(sum(losses) / 8, abs=1e-5)


def test_members_of_an_ensemble_do_not_see_each_other() -> None:
    model, tokens, places = frozen(tiny_model("llama")), torch.arange(9)[None], torch.tensor([[2, 7]])
    embeddings = random_embeddings(6)
    both = prompt_logits(model, embeddings, 3, tokens, places)
    apart = [prompt_logits(model, embeddings[member::2], 3, tokens, places) for member in (0, 1)]
    assert torch.allclose(both, sum(apart) / 2, atol=1e-4)
    assert not torch.allclose(apart[0], apart[1], atol=1e-2)


def test_only_the_embeddings_are_trained(target: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model = frozen(target)
    embeddings = training.initial_embeddings(target, tokenizer, 6).requires_grad_()
    loss = prompt_logits(model, embeddings, 3, torch.arange(9)[None], torch.tensor([[2, 7]])).square().mean()
    loss.backward()
    assert embeddings.numel() == 3 * 2 * 32
    assert embeddings.grad is not None
    assert (embeddings.grad.abs().sum(1) > 0).all()
    assert all(p.grad is None for m in (target, model) for p in m.parameters())
    assert all(p.requires_grad for p in target.parameters()), "the target is not changed"
    assert model.get_input_embeddings().weight.data_ptr() == target.get_input_embeddings().weight.data_ptr()


def test_the_teacher_is_the_targets_own_greedy_roll_out(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = GreedyText([training.write_text(target, tokenizer, seed=0)], target, 3)
    assert len(text.tokens) == 4  # of twelve rows every third is greedy
    for row in range(2):
        places = text.places[row][-3:]
        logits = text.teacher(torch.tensor([row]), places[None])[0]
        for place, taught in zip(places.tolist(), logits, strict=True):
            ids = text.tokens[row, : place + 1].tolist()
            for ahead in range(3):
                with torch.no_grad():
                    ids.append(int(target(torch.tensor([ids])).logits[0, -1].argmax()))
                    after = target(torch.tensor([ids])).logits[0, -1]
                assert ids[-1] == int(text.tokens[row, place + 1 + ahead])
                assert torch.allclose(taught[ahead], after, atol=0.05)  # states are kept in float16


def test_places_lie_in_greedy_turns_only(target: PreTrainedModel) -> None:
    states = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(0))
    tokens = torch.zeros(3, 20, dtype=torch.long)
    head = target.get_output_embeddings()
    with torch.no_grad():
        tokens[:, 1:] = head(states[:, :-1].half().float()).argmax(-1)
    free = torch.ones_like(tokens, dtype=torch.bool)
    free[:, :6] = free[:, 12:14] = False
    tokens[0, 15] += 1  # the second turn was not greedy
    text = GreedyText([SelfText(tokens, states.half(), free)], target, 3)
    assert [places.tolist() for places in text.places] == [[5, 6, 7, 8]]
    with pytest.raises(InputError, match="texts: no greedy answer"):
        GreedyText([SelfText(tokens, states.half(), torch.zeros_like(free))], target, 3)


def test_accuracy_is_the_share_of_each_rank(target: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    text = GreedyText([training.write_text(target, tokenizer, seed=0)], target, 3)
    perfect = measure_accuracy(text.teacher, text)
    assert perfect.shape == (4, 3, 10)
    assert perfect[:, :, 0].allclose(torch.ones(4, 3))

    def second(rows: Tensor, places: Tensor) -> Tensor:
        logits = text.teacher(rows, places)
        return logits.scatter(-1, logits.argmax(-1, keepdim=True), logits.topk(2).values[..., 1:] - 1e-4)

    assert measure_accuracy(second, text)[:, :, 1].mean() > 0.9


@pytest.mark.parametrize("ensemble", [1, 2])
def test_it_learns_what_the_target_says_next(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, ensemble: int
) -> None:
    found = train_prompt_tokens(
        target, tokenizer, tmp_path, ensemble=ensemble, batches=4, steps=60, learning_rate=3e-2
    )
    assert set(found) == {f"top-{top} of S_{i}" for top in (1, 10) for i in (1, 2, 3)}
    assert not (tmp_path / "unfinished").exists()
    trained = load_prompt_tokens(target, tmp_path)
    assert trained.embeddings.shape == (3 * ensemble, 32)
    text = GreedyText([training.write_text(target, tokenizer, seed=9)], target, 3)
    rows, places = (
        torch.arange(len(text.tokens)),
        torch.stack([each[torch.arange(8) % len(each)] for each in text.places]),
    )
    untrained = training.initial_embeddings(target, tokenizer, 3 * ensemble)
    ours, theirs = (
        float(divergence(prompt_guess(target, each, text)(rows, places), text.teacher(rows, places)))
        for each in (trained.embeddings, untrained)
    )
    assert ours < 0.95 * theirs
    session = Session(target)
    if ensemble > 1:
        with pytest.raises(InputError, match="embeddings: 6 for 3 prompts"):
            trained.drafter(session)
    else:
        check_drafter(trained.drafter(session, budget=12), session)


def test_a_run_that_is_cut_off_gives_the_same_prompts(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    class Cut(Exception):
        pass

    def cut(done: int, total: int, what: str) -> None:
        if what.startswith("loss") and done == 110:
            raise Cut

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_prompt_tokens(target, tokenizer, whole, batches=2, steps=120)
    with pytest.raises(Cut):
        train_prompt_tokens(target, tokenizer, parts, batches=2, steps=120, progress=cut)
    assert not (parts / "model.safetensors").exists()
    train_prompt_tokens(target, tokenizer, parts, batches=2, steps=120)
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_clear_errors(target: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name, value in (("batches", 1), ("prompts", 0), ("ensemble", 0)):
        with pytest.raises(InputError, match=f"{name}: {value}"):
            train_prompt_tokens(target, tokenizer, tmp_path, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="target: its sliding window of 6"):
        train_prompt_tokens(tiny_model("mistral", vocab_size=300), tokenizer, tmp_path / "w", batches=2)
    with pytest.raises(InputError, match="holds no prompt tokens"):
        load_prompt_tokens(target, tmp_path / "nothing")
    save_prompt_tokens(TrainedPrompts(torch.zeros(4, 32), torch.zeros(3, 10)), tmp_path)
    with pytest.raises(InputError, match=r"says \[3, 10\] prompts, but holds 4"):
        load_prompt_tokens(target, tmp_path)
    with pytest.raises(InputError, match="width 576, but the target's is 32"):
        load_prompt_tokens(target)
    with pytest.raises(InputError, match=r"embeddings: expected \[m, 32\], got \[3, 31\]"):
        TrainedPrompts(torch.zeros(3, 31), torch.zeros(3, 10)).drafter(Session(target), 9)


@pytest.mark.model
def test_the_prompts_that_are_kept_guess_for_smollm2() -> None:
    loaded = load("smollm2-135m")
    trained = load_prompt_tokens(loaded.model)
    assert trained.embeddings.shape == (3, 576)
    assert trained.accuracy.shape == (3, 10)
    session = Session(loaded.model)
    stops = stop_ids(loaded.model, loaded.tokenizer)
    decode = SpeculativeDecoder(session, trained.drafter(session, budget=12))
    tokens = passes = 0
    for prompt in prompts(split="test", limit=3):
        ids = encode_prompt(loaded.tokenizer, prompt.text)
        own = loaded.model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=stops)
        generation = decode.generate(ids, 24, stops)
        assert generation.token_ids == own[0, len(ids) :].tolist()
        tokens, passes = tokens + len(generation.token_ids), passes + generation.target_passes
    assert tokens / passes > 1.1
