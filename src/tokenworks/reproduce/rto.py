"""RTO (arXiv 2404.18922): does PPO learn from fewer texts when a DPO model says which tokens were good?

The paper reports +7.5 points over PPO on AlpacaEval 2 with Llama-3-8B, and PPO's level from a fraction of the
data. Here a small model of a made-up language of short sentences learns to use glad words and no sad ones. It is
told the difference of their numbers once, at the end of a text, as in the paper. The same loop with the same
settings is run as PPO, as RTO, as RTO with its token rewards shuffled within each text (a control: the same
rewards in the wrong places), and as PPO with twice the texts.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tokenworks.align.contract import Pairs
from tokenworks.align.dpo import DPO
from tokenworks.align.rto import dense_term
from tokenworks.core.measure import Interval, bootstrap, mean_interval
from tokenworks.core.training import fit
from tokenworks.reproduce import Run, rto_sentiment
from tokenworks.reproduce.ledger import Ledger
from tokenworks.reproduce.ppo import (
    BETA1,
    BETA2,
    CLIP,
    TEXTS,
    Learner,
    Round,
    curve,
    needed_for_ppo,
)
from tokenworks.reproduce.preferring import shuffle
from tokenworks.reproduce.result import Figure, Result, exact, figure

NOUNS = ("room", "film", "train", "soup", "song", "road", "hotel", "coat", "boat", "game")
PLAIN = ("large", "old", "green", "long", "usual", "quiet", "local", "round")
GLAD, SAD = ("good", "lovely", "superb", "happy", "great", "kind"), ("bad", "awful", "dull", "sad", "poor", "rude")
VERBS, JOINS = ("was", "seemed", "looked", "felt"), ("and", "but", "then")
WORDS = ("<end>", "the", "very", *NOUNS, *PLAIN, *GLAD, *SAD, *VERBS, *JOINS)
IDS = {word: place for place, word in enumerate(WORDS)}
WORTH = torch.tensor([float(word in GLAD) - float(word in SAD) for word in WORDS])

LONGEST = 24
RATES = {"actor": 1e-3, "critic": 1e-3}
"""The policy's was chosen of three for PPO alone, on a seed that is not measured: it earned most with it."""

WAYS = ("PPO", "RTO", "RTO shuffled", "PPO, twice the texts")


@dataclass(frozen=True)
class Written:
    """Texts as rows: ids int64 [B, T], and a mask bool [B, T] that ends with the end of the text."""

    ids: Tensor
    mask: Tensor

    @property
    def rewards(self) -> Tensor:
        """Glad words minus sad ones: float [B]."""
        return torch.where(self.mask, WORTH[self.ids], 0.0).sum(1)


def run(settings: Run) -> Result:
    """Measure: on the small model in about a minute a seed on one CPU core and at least five seeds, on SmolLM2 in
    about an hour; `quick` leaves that out and takes one minute."""
    begun = time.perf_counter()
    seeds, rounds, steps = (2, 12, 60) if settings.quick else (max(5, settings.seeds), 40, 400)
    facts = {"rounds": rounds, "texts": TEXTS, "pretraining_steps": steps, "rates": RATES, "beta1": BETA1}
    ledger = Ledger(settings.folder / "unfinished" / "rto", {**facts, "torch": torch.__version__})
    reference = pretrain(steps)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    others: list[dict[str, float]] = []
    for seed in range(seeds):
        dpo = train_dpo(reference, seed, steps // 4)
        others.append(ledger.once(f"others {seed}", partial(_others, reference, dpo, seed)))
        for number, way in enumerate(WAYS):
            settings.progress(seed * len(WAYS) + number, seeds * len(WAYS), f"{way}, seed {seed}")
            found[way].append(ledger.once(f"{way} {seed}", partial(learn, reference, dpo, way, seed, rounds)))
    real = rto_sentiment.Found(_on_smollm2(settings, ledger))
    result = Result(
        slug="rto",
        claim="",
        figures=[*_figures(found), *real.figures()],
        seeds=list(range(seeds)),
        seconds=time.perf_counter() - begun,
        model="a Llama of 2 layers and 64 dimensions, trained here on made-up sentences",
        settings={**facts, "clip": CLIP, "beta2": BETA2, "beta3": 1.0, "longest": LONGEST},
        table=[*_table(found, others), *real.rows()],
        series=[curve(found, "Reward by texts written", "glad minus sad words in a text"), *real.series()],
        notes=[
            "The sentence reward is exact, so that an imperfect reward model plays no part; it is normalised by "
            "the reference's mean and deviation, as the authors' is.",
            "The critic is a small network on the reference's last states and not begun as a reward model.",
            "A seed varies the DPO pairs and their order, and what is sampled. The verdict is that of the made-up "
            "language, where there are controls and more seeds; what SmolLM2 did stands beside it.",
            "A way that never earns PPO's final reward is counted as if it had needed twice its rounds.",
        ],
    )
    ledger.close()
    return result


def _on_smollm2(settings: Run, ledger: Ledger) -> dict[str, list[dict[str, Any]]]:
    """The same two ways on a real model, which is too slow for the controls; nothing if the run is a quick one."""
    if settings.quick:
        return {}
    study = rto_sentiment.Study(25)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in rto_sentiment.WAYS}
    total = rto_sentiment.SEEDS * len(found)
    for seed in range(rto_sentiment.SEEDS):
        for number, way in enumerate(found):
            settings.progress(seed * len(found) + number, total, f"SmolLM2, {way}, seed {seed}")
            work = partial(study.learn, way, seed, rto_sentiment.ROUNDS)
            found[way].append(ledger.once(f"SmolLM2 {way} {seed}", work))
    return found


# --- the language and its models ------------------------------------------------------------------------------


def sentence(rng: random.Random) -> list[int]:
    """Of one to three clauses; an adjective is plain half the time, else glad or sad."""
    found: list[str] = []
    for clause in range(rng.choice((1, 2, 2, 3))):
        found += [rng.choice(JOINS)] * (clause > 0) + ["the", rng.choice(NOUNS), rng.choice(VERBS)]
        found += ["very"] * (rng.random() < 0.3)
        found += [rng.choice(rng.choice((PLAIN, PLAIN, GLAD, SAD)))]
    return [IDS[word] for word in [*found, "<end>"]]


def pretrain(steps: int) -> PreTrainedModel:
    """A model of the language; the first token <end> begins a text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=LONGEST + 1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)

    def loss(step: int) -> Tensor:
        rng = random.Random(step)
        return -log_probs(model, pad([sentence(rng) for _ in range(64)]))[1].mean()

    fit(model, loss, steps, 3e-3)
    return model.requires_grad_(False).eval()


def pad(texts: Sequence[list[int]]) -> Written:
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = True
    return Written(ids, mask)


def read(model: PreTrainedModel, texts: Written) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token, without what is padding: log-probabilities [B, T], the whole distributions [B, T, V], and the
    states [B, T, d] they come from."""
    begun = torch.cat([torch.zeros(len(texts.ids), 1, dtype=torch.long), texts.ids[:, :-1]], 1)
    states = model.model(input_ids=begun, use_cache=False).last_hidden_state
    log = model.lm_head(states).log_softmax(-1)
    own = log.gather(2, texts.ids[..., None])[..., 0]
    return torch.where(texts.mask, own, 0.0), log, states


def log_probs(model: PreTrainedModel, texts: Written) -> tuple[Tensor, Tensor]:
    """[B, T], zero at padding, and those of the tokens alone [N]."""
    found = read(model, texts)[0]
    return found, found[texts.mask]


@torch.no_grad()
def write(model: PreTrainedModel, count: int, generator: torch.Generator) -> Written:
    """Sampled at temperature 1, until the end or `LONGEST` tokens."""
    cache, last = DynamicCache(), torch.zeros(count, 1, dtype=torch.long)
    ids: list[Tensor] = []
    alive = [torch.ones(count, dtype=torch.bool)]
    while len(ids) < LONGEST and alive[-1].any():
        logits = model(input_ids=last, past_key_values=cache, use_cache=True).logits[:, -1]
        last = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids.append(last[:, 0])
        alive.append(alive[-1] & (last[:, 0] != 0))
    return Written(torch.stack(ids, 1), torch.stack(alive[: len(ids)], 1))


def train_dpo(reference: PreTrainedModel, seed: int, steps: int) -> PreTrainedModel:
    """On 512 pairs, the gladder of two texts preferred; ties are left out."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    one, two = write(reference, 1024, generator), write(reference, 1024, generator)
    rows = (one.rewards != two.rewards).nonzero()[:512, 0].tolist()
    first = (one.rewards > two.rewards).tolist()
    texts = [[w.ids[row][w.mask[row]].tolist() for w in (one, two)] for row in rows]
    pairs = [texts[place] if first[row] else texts[place][::-1] for place, row in enumerate(rows)]
    model = copy.deepcopy(reference).requires_grad_(True)
    method = DPO(0.1)

    def loss(step: int) -> Tensor:
        chosen = random.Random(1000 * seed + step).sample(pairs, 32)
        batch = pad([pair[0] for pair in chosen] + [pair[1] for pair in chosen])
        with torch.no_grad():
            log_ref = read(reference, batch)[0]
        return method(Pairs(read(model, batch)[0], log_ref, batch.mask)).loss.mean()

    fit(model, loss, steps, 3e-4)
    return model.requires_grad_(False)


# --- the loop -------------------------------------------------------------------------------------------------


def learn(
    reference: PreTrainedModel,
    dpo: PreTrainedModel,
    way: str,
    seed: int,
    rounds: int,
    rate: float = RATES["actor"],
) -> dict[str, Any]:
    """PPO in one of `WAYS`: "rewards" by round, and at the end "reward", "kl", "length" and "distinct"."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    count = TEXTS * (2 if "twice" in way else 1)
    actor = copy.deepcopy(reference).requires_grad_(True)
    learner = Learner(actor.parameters(), reference.config.hidden_size, (rate, RATES["critic"]))
    plain = write(reference, 1024, torch.Generator().manual_seed(1)).rewards
    mean, deviation = plain.mean(), plain.std()
    earned = []
    for _ in range(rounds):
        texts = write(actor, count, generator)
        earned.append(texts.rewards.mean().item())
        with torch.no_grad():
            (log_old, _, _), (log_ref, _, states), (log_dpo, _, _) = (
                read(m, texts) for m in (actor, reference, dpo)
            )
        ratio = log_dpo - log_ref
        if way == "RTO shuffled":
            ratio = shuffle(ratio, texts.mask, generator)
        if not way.startswith("RTO"):
            ratio = torch.zeros_like(ratio)
        sentence = (texts.rewards - mean) / deviation

        def again(part: Tensor, texts: Written = texts) -> Tensor:
            return read(actor, Written(texts.ids[part], texts.mask[part]))[0]

        learner.learn(Round(texts.mask, sentence, log_old, log_ref, ratio, states), again, generator)
    return {"rewards": earned, **judge(actor, reference, seed)}


@torch.no_grad()
def judge(model: PreTrainedModel, reference: PreTrainedModel, seed: int, count: int = 512) -> dict[str, float]:
    """What a model's texts earn, how far it is from the reference over a text, and how it writes."""
    texts = write(model, count, torch.Generator().manual_seed(20_000 + seed))
    log, other = (read(m, texts)[1] for m in (model, reference))
    kl = torch.where(texts.mask, (log.exp() * (log - other)).sum(-1), 0.0).sum(1).mean()
    words = texts.ids[texts.mask]
    return {
        "reward": texts.rewards.mean().item(),
        "kl": kl.item(),
        "length": texts.mask.sum(1).float().mean().item(),
        "distinct": len(words.unique()) / len(WORDS),
    }


@torch.no_grad()
def _others(reference: PreTrainedModel, dpo: PreTrainedModel, seed: int) -> dict[str, float]:
    """What the reference, the best of four texts of it, and the DPO model earn without reinforcement learning; and
    what share of token rewards the clamp cuts."""
    generator = torch.Generator().manual_seed(30_000 + seed)
    texts = write(reference, 2048, generator)
    ratio = (read(dpo, texts)[0] - read(reference, texts)[0])[texts.mask]
    return {
        "reference": texts.rewards.mean().item(),
        "best of 4": texts.rewards.view(-1, 4).max(1).values.mean().item(),
        "DPO": judge(dpo, reference, seed)["reward"],
        "DPO kl": judge(dpo, reference, seed)["kl"],
        "clamped": (dense_term(ratio, BETA1, CLIP).abs() == CLIP).float().mean().item(),
        "sees": np.corrcoef(ratio.numpy(), WORTH[texts.ids[texts.mask]].numpy())[0, 1].item(),
    }


# --- the Result -----------------------------------------------------------------------------------------------


def _figures(found: dict[str, list[dict[str, Any]]]) -> list[Figure]:
    needed = {way: needed_for_ppo(found, way) for way in WAYS[:3]}

    def times(theirs: str) -> Interval:
        ratios = needed[theirs] / needed["RTO"]
        return bootstrap(lambda items: float(np.median(ratios[items])), len(ratios))

    faster, right = times("PPO"), times("RTO shuffled")
    gain = mean_interval([a["reward"] - b["reward"] for a, b in zip(found["RTO"], found["PPO"], strict=True)])
    median = {way: float(np.median(each)) for way, each in needed.items()}
    reward = {way: float(np.mean([each["reward"] for each in found[way]])) for way in WAYS}
    about: dict[str, Any] = {"ours": median["RTO"], "paper": "PPO's level from a fraction of the data"}
    return [
        figure("Texts until PPO's final reward, PPO's by RTO's: median over seeds", "ratio", faster, 1.01, 1.0,
               baseline=median["PPO"], baseline_name="PPO", headline=True, **about),
        figure("The same, as a number that should reach 1 / 0.6", "ratio", exact(faster.value), 1 / 0.6, 1.0,
               baseline=median["PPO"], baseline_name="PPO", headline=True, **about),
        figure("Texts until PPO's final reward, with shuffled token rewards by RTO's", "ratio", right, 1.01, 1.0,
               baseline=median["RTO shuffled"], baseline_name="RTO shuffled", headline=True, **about),
        figure("Final reward of RTO minus that of PPO", "glad minus sad words", gain, 0.0, 0.0, reward["RTO"],
               baseline=reward["PPO"], baseline_name="PPO", paper="+7.5 points on AlpacaEval 2"),
    ]  # fmt: skip


def _table(found: dict[str, list[dict[str, Any]]], others: list[dict[str, float]]) -> list[dict[str, Any]]:
    rows = []
    for way, runs in found.items():
        row: dict[str, Any] = {"method": way, "reward": str(mean_interval([each["reward"] for each in runs]))}
        rows.append(
            row | {n: round(float(np.mean([e[n] for e in runs])), 3) for n in ("kl", "length", "distinct")}
        )
    for name in ("reference", "best of 4", "DPO"):
        kl = round(float(np.mean([each["DPO kl"] for each in others])), 3) if name == "DPO" else None
        earned = str(mean_interval([each[name] for each in others]))
        rows.append({"method": name, "reward": earned, "kl": kl, "length": None, "distinct": None})
    return rows
