"""RTO on SmolLM2: the preference harness (`reproduce.sentiment`) with PPO in place of pairs.

The reward is VADER's score of what the policy wrote, told once at the end. The DPO model is the harness's, trained
on its pairs; policy and critic see what `reproduce.rto` gives them, and only the last six layers learn.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from tokenworks.align.data import openings
from tokenworks.align.vocabulary import Head, vocabulary_terms
from tokenworks.core.measure import bootstrap, mean_interval
from tokenworks.reproduce.ppo import TEXTS, Learner, Round, curve, needed_for_ppo
from tokenworks.reproduce.result import Figure, figure
from tokenworks.reproduce.sentiment import Sentiment
from tokenworks.reproduce.weighing import HeldOut
from tokenworks.reproduce.writing import Written, collate_texts, held_out, measure, states, write

WAYS = ("PPO", "RTO")
ROUNDS, SEEDS = 60, 3

RATES = (5e-5, 1e-3)
"""Learning rates of policy and critic. The policy's was chosen of three for PPO alone, on a seed that is not
measured: it earned most in the last five of ten rounds."""


class Study:
    """The harness, and how its reference's rewards are spread, which is what normalises them."""

    def __init__(self, used: int) -> None:
        self.bench = Sentiment()
        held = HeldOut(self.bench, 50)
        self.mean, self.deviation = float(held.rewards.mean()), float(held.rewards.std())
        self.prompts = held_out(used)

    def learn(self, way: str, seed: int, rounds: int, rate: float = RATES[0]) -> dict[str, Any]:
        """PPO or RTO: "rewards" by round, and of the held-out openings what `writing.measure` finds."""
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        bench = self.bench
        policy, trained = bench.begin()
        learner = Learner(trained.parameters(), bench.model.config.hidden_size, (rate, RATES[1]))
        dpo = bench.dpo(seed) if way == "RTO" else None
        earned = []
        for number in range(rounds):
            prompts = random.Random(1000 * seed + number).sample(openings("train"), TEXTS)
            texts = write(bench, bench.whole(policy), prompts, 7919 * seed + number)
            rewards = torch.tensor([bench.reward(bench.text(text.response)) for text in texts])
            earned.append(float(rewards.mean()))
            mask = pad_sequence([torch.ones(len(text.response), dtype=torch.bool) for text in texts], True)
            with torch.no_grad():
                (old, _), (ref, hidden) = (read(model, texts) for model in (policy, bench.reference))
                ratio = torch.zeros_like(ref) if dpo is None else read(dpo, texts)[0] - ref

            def again(part: Tensor, texts: list[Written] = texts, longest: int = mask.shape[1]) -> Tensor:
                found = read(policy, [texts[row] for row in part.tolist()])[0]
                return torch.nn.functional.pad(found, (0, longest - found.shape[1]))

            normalised = (rewards - self.mean) / self.deviation
            learner.learn(Round(mask, normalised, old, ref, ratio, hidden), again, generator)
        policy.requires_grad_(False)
        return {"rewards": earned, **measure(bench, policy, self.prompts, seed)}


def read(model: PreTrainedModel, texts: list[Written]) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, T] of what was written, and the states [B, T, d] it was predicted from."""
    batch = collate_texts(texts)
    hidden = states(model, batch)
    terms = vocabulary_terms(Head.of(model), hidden, batch.labels[batch.mask])
    lengths = batch.mask.sum(1).tolist()
    log_p, rows = (pad_sequence(list(values.split(lengths)), True) for values in (terms.log_p, hidden))
    return log_p, rows


class Found:
    """What the runs of each way found, as parts of a Result; nothing of no runs."""

    def __init__(self, runs: dict[str, list[dict[str, Any]]]) -> None:
        self.runs = runs

    def figures(self) -> list[Figure]:
        """Beside the verdict, not of it."""
        if not self.runs:
            return []
        needed = [needed_for_ppo(self.runs, way) for way in WAYS]
        ratios = needed[0] / needed[1]
        faster = bootstrap(lambda items: float(np.median(ratios[items])), len(ratios))
        earned = [np.mean([each["reward"] for each in runs], 0) for runs in (self.runs[way] for way in WAYS)]
        gain = mean_interval(earned[1] - earned[0])
        return [
            figure("SmolLM2: texts until PPO's final reward, PPO's by RTO's: median over seeds", "ratio", faster,
                   1.01, 1.0, ours=float(np.median(needed[1])), baseline=float(np.median(needed[0])),
                   baseline_name="PPO"),
            figure("SmolLM2: reward of RTO minus that of PPO on held-out openings", "VADER compound", gain, 0.0,
                   0.0, ours=float(earned[1].mean()), baseline=float(earned[0].mean()), baseline_name="PPO"),
        ]  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        found = []
        for way, runs in self.runs.items():
            means = {
                name: np.mean([each[name] for each in runs], 0) for name in ("reward", "kl", "tokens", "distinct")
            }
            found.append(
                {"method": f"SmolLM2, {way}", "reward": str(mean_interval(means["reward"])),
                 "kl": round(float(means["kl"].mean()), 3), "length": round(float(means["tokens"].mean()), 3),
                 "distinct": round(float(means["distinct"].mean()), 3)}
            )  # fmt: skip
        return found

    def series(self) -> list[dict[str, Any]]:
        return [curve(self.runs, "SmolLM2: reward by texts written", "VADER compound")] if self.runs else []
