"""AlignDistil: the identities behind the teacher, the loss, and TRL's trainer with it on and off policy."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.conftest import tiny_model
from tokenworks.align import vocabulary
from tokenworks.align.aligndistil import (
    MODES,
    AlignDistilLogitsProcessor,
    Composed,
    Mode,
    compose_teacher,
    distance,
    distil_loss,
    distil_trace,
)
from tokenworks.align.aligndistil_trainer import (
    AlignDistilConfig,
    AlignDistilTrainer,
    swap_preferences,
    train_reverse_dpo,
)
from tokenworks.align.trainer import TokenPreferenceConfig
from tokenworks.align.vocabulary import Head, vocabulary_terms
from tokenworks.core.corpus import train_bpe
from tokenworks.core.errors import InputError

PLAIN = {
    "per_device_train_batch_size": 2, "max_steps": 2, "report_to": [], "use_cpu": True, "bf16": False,
    "logging_steps": 1, "gradient_checkpointing": False, "save_strategy": "no", "learning_rate": 1e-2,
    "disable_tqdm": True, "max_completion_length": 6,
}  # fmt: skip
CONSTANT: tuple[Mode, ...] = ("theorem1", "contrast")


def logits(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float32)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


# --- the teacher ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("mode", CONSTANT)
def test_divergence_to_the_teacher_is_rlhf_at_the_token(mode: Mode, strength: float) -> None:
    """beta KL(p || teacher) + E_p[r] - beta KL(p || anchor) is the same number, beta log Z, for every p."""
    beta0 = 0.3
    log_dpo, log_other = (logits(9, seed=s).double().log_softmax(-1) for s in (1, 2))
    found = compose_teacher(log_dpo, log_other, mode, strength, beta0)
    reward, beta = beta0 * (log_dpo - log_other), beta0 / strength
    anchor = log_dpo if mode == "contrast" else log_other
    log_p = logits(50, 9, seed=3).double().log_softmax(-1)
    rest = beta * kl(log_p, found.log_probs.double()) + (log_p.exp() * reward).sum(-1) - beta * kl(log_p, anchor)
    normaliser = beta * torch.logsumexp(anchor + reward / beta, -1)
    torch.testing.assert_close(rest, normaliser.expand(50), atol=1e-6, rtol=1e-6)  # the teacher is float32


def test_ends_of_the_strength() -> None:
    log_dpo, log_other = (logits(4, 9, seed=s).log_softmax(-1) for s in (1, 2))
    for found in (
        compose_teacher(log_dpo, log_other, "theorem1", 1.0),
        compose_teacher(log_dpo, log_other, "aligndistil", 0.0, floor=1e-9),
        compose_teacher(log_dpo, log_other, "contrast", 1e-9),
        compose_teacher(log_dpo, log_dpo, "aligndistil", 15.0),
        compose_teacher(log_dpo, None, "gkd"),
    ):
        torch.testing.assert_close(found.log_probs, log_dpo, atol=1e-5, rtol=1e-5)
    agreed = compose_teacher(log_dpo, log_dpo, "aligndistil", 15.0, 0.1)
    torch.testing.assert_close(agreed.alpha, torch.full((4,), 1e-3))
    torch.testing.assert_close(agreed.beta, torch.full((4,), 100.0))
    half = compose_teacher(log_dpo, log_other, "theorem1", 0.5).log_probs
    torch.testing.assert_close(half, (0.5 * (log_dpo + log_other)).log_softmax(-1))


@pytest.mark.parametrize("mode", ["aligndistil", "contrast", "theorem1", "theorem1_adaptive"])
def test_implausible_tokens_keep_the_anchors_weight(mode: Mode) -> None:
    """And the plausible ones go as far as ever: ratios between them are the teacher's."""
    log_dpo, log_other = (logits(4, 9, seed=s).log_softmax(-1) for s in (1, 2))
    plain = compose_teacher(log_dpo, log_other, mode, 3.0)
    found = compose_teacher(log_dpo, log_other, mode, 3.0, plausible=0.2)
    torch.testing.assert_close(found.alpha, plain.alpha)
    anchor = log_dpo if mode in ("aligndistil", "contrast") else log_other
    likely = log_dpo.exp() >= 0.2 * log_dpo.exp().amax(-1, keepdim=True)
    assert likely.any(1).all()
    assert not likely.all(1).any()
    for row, inside in enumerate(likely):
        for ours, theirs in ((plain.log_probs[row, inside], inside), (anchor[row, ~inside], ~inside)):
            gap = found.log_probs[row, theirs] - ours
            torch.testing.assert_close(gap, gap[:1].expand_as(gap), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        compose_teacher(log_dpo, log_other, mode, 3.0, plausible=1e-9).log_probs, plain.log_probs
    )


@pytest.mark.parametrize("mode", [*CONSTANT, "aligndistil", "theorem1_adaptive"])
def test_the_teacher_is_the_best_policy_at_the_token(mode: Mode) -> None:
    log_dpo, log_other = (logits(6, seed=s, scale=0.7).log_softmax(-1) for s in (1, 2))
    found = compose_teacher(log_dpo, log_other, mode, 2.0, 0.2)
    anchor = log_dpo if mode in ("contrast", "aligndistil") else log_other

    def value(log_p: Tensor) -> Tensor:
        log_p = log_p.double()
        return (log_p.exp() * 0.2 * (log_dpo - log_other)).sum(-1) - found.beta * kl(log_p, anchor)

    others = (found.log_probs + logits(10_000, 6, seed=5, scale=0.3)).double().log_softmax(-1)
    assert (value(others) < value(found.log_probs) + 1e-7).all()  # the teacher is float32
    assert value(others).mean() < value(found.log_probs) - 1e-5


def rlhf_over_texts(log_dpo: list[Tensor], log_ref: list[Tensor], beta0: float, beta: float) -> Tensor:
    """The optimum of E[beta0 sum log dpo/ref] - beta KL over all texts of two tokens, at the first token."""
    first = beta0 / beta * (log_dpo[0] - log_ref[0]) + log_ref[0]
    second = torch.logsumexp(log_ref[1] + beta0 / beta * (log_dpo[1] - log_ref[1]), -1)
    return (first + second).log_softmax(-1)


def test_over_whole_texts_only_the_matching_beta_is_the_optimum() -> None:
    log_dpo, log_ref = (
        [logits(3, seed=s).log_softmax(-1), logits(3, 3, seed=s + 1).log_softmax(-1)] for s in (1, 5)
    )
    same, stronger = (compose_teacher(log_dpo[0], log_ref[0], "theorem1", k, 0.1).log_probs for k in (1.0, 4.0))
    torch.testing.assert_close(rlhf_over_texts(log_dpo, log_ref, 0.1, 0.1), same, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(same, log_dpo[0], atol=1e-5, rtol=1e-4)
    whole = rlhf_over_texts(log_dpo, log_ref, 0.1, 0.025)
    assert (whole.exp() - stronger.exp()).abs().sum() > 0.05  # it looks ahead, the teacher does not


def test_the_distance_and_what_follows_from_it() -> None:
    one, two = (logits(500, 5, seed=s, scale=4.0).log_softmax(-1) for s in (1, 2))
    d = distance(one, two)
    assert (d >= 0).all()
    assert (d <= 2 + 1e-6).all()
    torch.testing.assert_close(d, distance(two, one))
    assert distance(one, one).max() == 0
    apart = torch.tensor([[0.0, float("-inf")], [float("-inf"), 0.0]])
    assert distance(apart[:1], apart[1:]).item() == 2.0  # no factor of a half
    found = compose_teacher(one, two, "aligndistil", 15.0, 0.1)
    torch.testing.assert_close(found.alpha, 15 * d + 1e-3)
    assert (found.alpha.argsort() == d.argsort()).all()
    torch.testing.assert_close(found.alpha * found.beta, torch.full((500,), 0.1))


def test_constants_added_to_logits_change_nothing() -> None:
    one, two, shift = logits(4, 9, seed=1), logits(4, 9, seed=2), logits(2, 4, 1, seed=3, scale=20.0)
    for mode in MODES:
        plain, moved = (
            compose_teacher(a, b, mode, 3.0)  # type: ignore[arg-type]
            for a, b in ((one, two), (one + shift[0], two + shift[1]))
        )
        for before, after in zip(plain, moved, strict=True):
            torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)


def test_exchanged_models_teach_the_opposite() -> None:
    """Likelier under the DPO model is likelier still for the teacher, and less likely once they are swapped."""
    right, wrong = torch.tensor([1.0, 0.0, 0.0]).log_softmax(-1), torch.tensor([0.0, 1.0, 0.0]).log_softmax(-1)
    ahead, back = compose_teacher(right, wrong), compose_teacher(wrong, right)
    torch.testing.assert_close(ahead.alpha, back.alpha)
    assert ahead.log_probs[0] > right[0] > wrong[0] > back.log_probs[0]


# --- the loss ------------------------------------------------------------------------------------------------


def heads(tokens: int, seed: int) -> tuple[Head, Tensor]:
    return Head(logits(13, 5, seed=seed, scale=1.0)), logits(tokens, 5, seed=seed + 1, scale=1.0)


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradient_in_closed_form(mode: Mode, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """d loss / d logits = beta p (log p - log teacher - KL) / length, through the chunked terms."""
    monkeypatch.setattr(vocabulary, "CHUNK", chunk)
    student = logits(8, 13, seed=9).requires_grad_(True)
    (dpo, other), mask = (heads(8, 1), heads(8, 3)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    teacher = Composed(dpo, None if mode == "gkd" else other, mode, 2.0, 0.1)
    terms = vocabulary_terms(Head(torch.eye(13)), student, torch.zeros(8).long(), teacher, "reverse")
    rows = [torch.zeros(mask.shape).masked_scatter(mask, x) for x in (terms.divergence, teacher.beta)]
    loss = distil_loss(*rows, mask)
    loss.backward()
    taught = compose_teacher(dpo[0].log_probs(dpo[1]), other[0].log_probs(other[1]), mode, 2.0, 0.1)
    torch.testing.assert_close(teacher.alpha, taught.alpha)
    log_p = student.detach().log_softmax(-1)
    each = kl(log_p, taught.log_probs)
    length = torch.tensor([5.0] * 5 + [3.0] * 3)
    torch.testing.assert_close(loss.detach(), (taught.beta * each / length).sum() / 2)
    expected = (taught.beta / length / 2)[:, None] * log_p.exp() * (log_p - taught.log_probs - each[:, None])
    torch.testing.assert_close(student.grad, expected, atol=1e-6, rtol=1e-4)


def test_gradient_is_that_of_rlhf_at_the_token() -> None:
    log_dpo, log_other = (logits(7, 9, seed=s).log_softmax(-1) for s in (1, 2))
    taught = compose_teacher(log_dpo, log_other, "aligndistil", 2.0, 0.1)
    gradients = []
    for distil in (True, False):
        student = logits(7, 9, seed=3).requires_grad_(True)
        log_p = student.log_softmax(-1)
        if distil:
            (taught.beta * kl(log_p, taught.log_probs)).sum().backward()
        else:
            reward = (log_p.exp() * 0.1 * (log_dpo - log_other)).sum(-1)
            (taught.beta * kl(log_p, log_dpo) - reward).sum().backward()
        gradients.append(student.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_the_loss_is_zero_only_at_the_teacher() -> None:
    dpo, other = heads(6, 1), heads(6, 3)
    mask = torch.ones(2, 3).bool()
    losses = []
    for student in (Composed(dpo, other, "aligndistil", 2.0, 0.1)(slice(0, 6)), logits(6, 13, seed=8)):
        teacher = Composed(dpo, other, "aligndistil", 2.0, 0.1)
        terms = vocabulary_terms(Head(torch.eye(13)), student, torch.zeros(6).long(), teacher, "reverse")
        losses.append(float(distil_loss(terms.divergence.view(2, 3), teacher.beta.view(2, 3), mask)))
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert losses[1] > 0.01


def test_length_and_padding_do_not_count() -> None:
    divergence, beta = logits(2, 4, seed=1).abs(), logits(2, 4, seed=2).abs()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    plain = distil_loss(divergence, beta, mask)
    torch.testing.assert_close(
        plain, distil_loss(*(x.repeat(1, 3) for x in (divergence, beta)), mask.repeat(1, 3))
    )
    padded = (torch.cat([x, torch.full((2, 3), 7.0)], 1) for x in (divergence, beta))
    torch.testing.assert_close(plain, distil_loss(*padded, torch.cat([mask, torch.zeros(2, 3).bool()], 1)))


def test_training_a_table_reaches_the_teacher() -> None:
    log_dpo, log_other = (logits(5, 7, seed=s, scale=1.0).log_softmax(-1) for s in (1, 2))
    taught = compose_teacher(log_dpo, log_other, "aligndistil", 2.0, 0.1)
    table = torch.zeros(5, 7, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.05)
    mask = torch.ones(1, 5).bool()
    for step in range(2000):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 2000)
        divergence = kl(table.log_softmax(-1), taught.log_probs)
        loss = distil_loss(divergence[None], taught.beta[None], mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    distance_left = 0.5 * (table.softmax(-1) - taught.log_probs.exp()).abs().sum(-1)
    assert distance_left.max() < 1e-3


# --- the trainer ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    found = train_bpe(["nothing to merge"], 257, special=["<end>"])
    found.eos_token = "<end>"
    return found


def model(seed: int) -> PreTrainedModel:
    return tiny_model("llama", seed, vocab_size=257)


def data() -> Dataset:
    texts = [("abc", "def", "ghij"), ("xy", "zzzz", "q"), ("xyz", "zazz", "qr"), ("xyw", "zb", "qs")]
    return Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in texts])


def trainer(tokenizer: PreTrainedTokenizerBase, out: Path, **changes: Any) -> AlignDistilTrainer:
    models = {"dpo_model": model(1), "reverse_model": model(2)}
    passed = ("reverse_model", "ref_model", "dpo_model", "peft_config", "train_dataset", "eval_dataset")
    models |= {name: changes.pop(name) for name in passed if name in changes}
    return AlignDistilTrainer(
        model(0), models.pop("dpo_model"), train_dataset=models.pop("train_dataset", data()),
        processing_class=tokenizer, args=AlignDistilConfig(str(out), **(PLAIN | changes)), **models,
    )  # fmt: skip


def weights(found: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in found.state_dict().items()}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("on_policy", [True, False], ids=["on-policy", "off-policy"])
def test_training(lora: bool, on_policy: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Two steps: only what is to be trained changes, and the first loss is the one computed by hand."""
    options = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])} if lora else {}
    found = trainer(tokenizer, tmp_path, on_policy=on_policy, strength=2.0, **options)
    seen: list[dict[str, Tensor]] = []
    plain = found._compute_loss
    found._compute_loss = lambda m, i, n: seen.append(i) or plain(m, i, n)  # type: ignore[method-assign, func-returns-value]
    before = [weights(each) for each in (found.model, found.teacher_model, found.other_model)]
    found.train()
    after = [weights(each) for each in (found.model, found.teacher_model, found.other_model)]
    moved = [{n for n in one if not torch.equal(one[n], two[n])} for one, two in zip(before, after, strict=True)]
    assert moved[0]
    assert all("lora" in name for name in moved[0]) == lora
    assert not moved[1]
    assert not moved[2]
    log = [row for row in found.state.log_history if "loss" in row]
    assert log[0]["loss"] == pytest.approx(by_hand(seen[0], 2.0), rel=1e-4)
    assert log[0]["loss"] != log[1]["loss"]
    for name in ("alpha", "beta", "divergence", "entropy"):
        assert log[0][name] > 0
    if not on_policy:
        texts = {tokenizer.decode(row[m.bool()]) for i in seen
                 for row, m in zip(i["completion_ids"], i["completion_mask"], strict=True)}  # fmt: skip
        assert texts <= {"def<end>", "zzzz<end>", "zazz<end>", "zb<end>"}


def by_hand(inputs: dict[str, Tensor], strength: float) -> float:
    """From whole logits, text by text, without padding: all response tokens, the first and the end included."""
    each = []
    for place in range(len(inputs["prompt_ids"])):
        begin = inputs["prompt_ids"][place][inputs["prompt_mask"][place].bool()]
        response = inputs["completion_ids"][place][inputs["completion_mask"][place].bool()]
        ids = torch.cat([begin, response])[None]
        with torch.no_grad():
            log_p, log_d, log_r = (
                model(s)(ids).logits[0, len(begin) - 1 : -1].float().log_softmax(-1) for s in (0, 1, 2)
            )
        taught = compose_teacher(log_d, log_r, "aligndistil", strength, 0.1)
        assert len(log_p) == len(response)
        each.append((taught.beta * kl(log_p, taught.log_probs)).mean())
    return float(torch.stack(each).mean())


def test_accumulation_is_a_larger_batch(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    found = []
    for size, steps in ((4, 1), (1, 4)):
        run = trainer(
            tokenizer, tmp_path, on_policy=False, per_device_train_batch_size=size, optim="sgd", strength=2.0,
            gradient_accumulation_steps=steps, max_steps=1, max_grad_norm=0.0, shuffle_dataset=False,
        )  # fmt: skip
        run.train()
        found.append(weights(run.model))
    assert not torch.equal(found[0]["lm_head.weight"], model(0).lm_head.weight)
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["theorem1", "theorem1_adaptive", "gkd", "contrast"])
def test_every_mode_trains(mode: Mode, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    other = {"reverse_model": model(2) if mode == "contrast" else None}
    if mode.startswith("theorem1"):
        other["ref_model"] = model(0)
    found = trainer(tokenizer, tmp_path, mode=mode, strength=2.0, on_policy=False, **other)
    found.train()
    losses = [row["loss"] for row in found.state.log_history if "loss" in row]
    assert losses[1] < losses[0]


def test_evaluation(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    found = trainer(tokenizer, tmp_path, on_policy=False, eval_dataset=data())
    numbers = found.evaluate()
    assert numbers["eval_loss"] > 0
    assert numbers["eval_alpha"] > 0


def test_conversations(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Off-policy, a chosen message ends where the policy would have stopped."""
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}<end>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    )
    try:
        rows = [
            {"prompt": [{"role": "user", "content": "hi"}], "chosen": [{"role": "assistant", "content": "yo"}]}
        ]
        found = trainer(tokenizer, tmp_path, on_policy=False, train_dataset=Dataset.from_list(rows * 2))
        assert tokenizer.decode(found._chosen_ids(rows[0])) == "yo<end>"
        found.train()
    finally:
        tokenizer.chat_template = None


def test_the_reverse_model(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    swapped = swap_preferences(data())
    assert (swapped[0]["chosen"], swapped[0]["rejected"]) == ("ghij", "def")
    settings = TokenPreferenceConfig(str(tmp_path), **(_dpo() | {"max_steps": 8}))
    trained = train_reverse_dpo(model(0), data(), ref_model=model(0), args=settings, processing_class=tokenizer)

    def margin(found: Any) -> float:
        total = 0.0
        for row in data():
            for text, sign in ((row["chosen"], 1), (row["rejected"], -1)):
                begin, ids = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (row["prompt"], text))
                with torch.no_grad():
                    log = found(torch.tensor([begin + ids])).logits[0, len(begin) - 1 : -1].log_softmax(-1)
                total += sign * float(log[range(len(ids)), ids].sum())
        return total

    assert margin(trained) < margin(model(0))


def _dpo() -> dict[str, Any]:
    return {name: value for name, value in PLAIN.items() if name != "max_completion_length"}


# --- without training ----------------------------------------------------------------------------------------


def test_the_processor_writes_what_the_teacher_says() -> None:
    """Greedy and sampled, against whole passes; batched with padding and alone."""
    dpo, reverse, writer = model(1), model(2), model(0)
    prompts = [[3, 4, 5, 6], [7, 8]]
    for settings in ({"do_sample": False}, {"do_sample": True, "top_k": 0}):
        alone = []
        for row in prompts:
            torch.manual_seed(0)
            processor = AlignDistilLogitsProcessor(dpo, reverse, strength=2.0)
            ids = torch.tensor([row])
            alone.append(
                writer.generate(ids, max_new_tokens=6, logits_processor=[processor], **settings)[0].tolist()
            )
        if not settings["do_sample"]:
            for row, made in zip(prompts, alone, strict=True):
                for place in range(len(row), len(made)):
                    with torch.no_grad():
                        one, two = (m(torch.tensor([made[:place]])).logits[0, -1] for m in (dpo, reverse))
                    assert made[place] == compose_teacher(one, two, strength=2.0).log_probs.argmax()
            processor = AlignDistilLogitsProcessor(dpo, reverse, strength=2.0, pad_token_id=0)
            padded = torch.tensor([prompts[0], [0, 0, *prompts[1]]])
            made = writer.generate(
                padded, attention_mask=(padded != 0).long(), max_new_tokens=6, logits_processor=[processor],
                pad_token_id=0, do_sample=False,
            )  # fmt: skip
            assert made[:, 4:].tolist() == [alone[0][4:], alone[1][2:]]
            again = writer.generate(
                torch.tensor([prompts[1]]), max_new_tokens=6, logits_processor=[processor], do_sample=False
            )
            assert again[0].tolist() == alone[1]  # another text begins anew


def test_the_trace(tokenizer: PreTrainedTokenizerBase) -> None:
    trace = distil_trace(model(0), model(1), model(2), tokenizer, "abc", "defg", strength=3.0)
    assert set(trace.channels) == {"alpha", "beta", "divergence", "push"}
    assert "".join(trace.tokens) == "defg"
    for alpha, beta in zip(trace.channels["alpha"].values, trace.channels["beta"].values, strict=True):
        assert alpha * beta == pytest.approx(0.1, rel=1e-5)
    same = distil_trace(model(0), model(0), None, tokenizer, "abc", "defg", "gkd")
    assert same.channels["divergence"].values == pytest.approx([0] * 4, abs=1e-6)


# --- misuse --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mode": "other"}, "mode: there is no 'other'"),
        ({"beta0": 0.0}, "beta0: 0.0"),
        ({"strength": -1.0}, "strength: -1.0"),
        ({"mode": "contrast", "strength": 0.0}, "strength: 0.0"),
        ({"floor": 0.0}, "floor: 0.0"),
        ({"plausible": 1.5}, r"plausible: 1.5 is not in \[0, 1\]"),
        ({"log_other": None}, "log_other: mode 'aligndistil' needs the reverse model"),
        ({"log_other": None, "mode": "theorem1"}, "needs the reference"),
        ({"log_other": torch.zeros(2, 6)}, r"log_other: shape \[2, 6\]"),
    ],
)
def test_bad_teachers(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        compose_teacher(**({"log_dpo": torch.zeros(2, 5), "log_other": torch.zeros(2, 5)} | arguments))


def test_a_text_without_tokens() -> None:
    with pytest.raises(InputError, match="mask: a text has no token"):
        distil_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([[True] * 3, [False] * 3]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reverse_model": None}, "reverse_model: mode 'aligndistil' needs it"),
        ({"ref_model": tiny_model("llama", 3, vocab_size=257)}, "ref_model: mode 'aligndistil' has no use for it"),
        ({"mode": "gkd"}, "reverse_model: mode 'gkd' has no use for it; it takes only dpo_model"),
        ({"dpo_model": tiny_model("llama", vocab_size=300)}, "dpo_model: it knows 300 tokens"),
        ({"reverse_model": tiny_model("llama", vocab_size=300)}, "reverse_model: it knows 300 tokens"),
        ({"reverse_model": "a/name"}, "reverse_model: str is not a loaded model"),
        ({"beta0": -1.0}, "beta0: -1.0"),
        ({"beta": 0.5}, "beta: 0.5; AlignDistil's loss has it at 1"),
        ({"temperature": 0.7}, "temperature: 0.7"),
        ({"on_policy": False, "max_completion_length": 3}, "max_completion_length: 3 cuts off .* row 0"),
        ({"on_policy": False, "train_dataset": Dataset.from_list([{"prompt": "a"}])}, 'no column "chosen"'),
        ({"on_policy": False, "train_dataset": Dataset.from_list([{"prompt": "a", "chosen": ""}])},
         "the chosen response of row 0 is empty"),
    ],
)  # fmt: skip
def test_misuse(changes: dict[str, Any], said: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        trainer(tokenizer, tmp_path, **changes)


def test_data_without_both_responses() -> None:
    with pytest.raises(InputError, match="no column 'rejected'"):
        swap_preferences(Dataset.from_list([{"prompt": "a", "chosen": "b"}]))


def test_processors_that_do_not_fit() -> None:
    for arguments, said in itertools.chain(
        [((model(1), None), "other_model: mode 'aligndistil' needs one")],
        [((model(1), tiny_model("llama", vocab_size=300)), "it knows 300 tokens")],
        [((model(1), model(2), "contrast", 0.0), "strength: 0.0")],
    ):
        with pytest.raises(InputError, match=said):
            AlignDistilLogitsProcessor(*arguments)  # type: ignore[arg-type]
