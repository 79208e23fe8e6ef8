"""The preference harness: SmolLM2 continues neutral openings, and the gladder of two texts is the better.

Reward is VADER's compound score in [-1, 1], whose lexicon gives words a value: whether a method found the words
that matter can be checked. The model is read as a plain language model, and only its last six layers and the final
norm are trained, on what the layers below made of the data once. A response is one sentence.

    bench = Sentiment()
    policy = bench.train(DPO(0.1), epochs=1, seed=0)
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from tokenworks.align.contract import Needs, Pairs, PreferenceMethod
from tokenworks.align.data import SentimentPair, first_sentence, sentiment_pairs
from tokenworks.align.dpo import DPO
from tokenworks.align.reading import (
    Batch,
    EncodedPair,
    collate,
    encode_pair,
    join_pairs,
    let_read,
    read_policy,
    read_reference,
)
from tokenworks.core.files import atomic_write, cache_folder
from tokenworks.core.models import load
from tokenworks.core.training import fit

MODEL = "smollm2-135m"

TRAINED = 6
"""Layers that are trained, the last ones."""

PAIRS = 16
"""In a step."""

LEARNING_RATE = 5e-5
SAMPLES = 4
"""Continuations of each held-out opening, of at most `NEW_TOKENS`."""

NEW_TOKENS = 24


@dataclass(frozen=True)
class Encoded:
    """A pair with what the frozen layers made of it, float32 [S, d] for each response."""

    pair: EncodedPair
    trunk: tuple[Tensor, Tensor]


class Sentiment:
    """The model in two parts, the data, and the judge.

    Attributes:
        model, tokenizer: the whole model; its last layers are those of the reference.
        reference: the last layers as a model of their own, which read what the trunk gives.
    """

    def __init__(self) -> None:
        loaded = load(MODEL)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.reference = self._top(self.model)
        self._judge = SentimentIntensityAnalyzer()

    def _top(self, model: PreTrainedModel) -> PreTrainedModel:
        config = copy.deepcopy(model.config)
        config.num_hidden_layers = TRAINED
        top: Any = AutoModelForCausalLM.from_config(config)
        whole: Any = model
        top.model.layers = copy.deepcopy(whole.model.layers[-TRAINED:])
        for place, layer in enumerate(top.model.layers):
            layer.self_attn.layer_idx = place
        top.model.norm = copy.deepcopy(whole.model.norm)
        top.model.embed_tokens, top.lm_head = whole.model.embed_tokens, whole.lm_head
        top.requires_grad_(False).eval()
        let_read(top)
        return top

    def reward(self, text: str) -> float:
        """VADER's compound score."""
        return float(self._judge.polarity_scores(text)["compound"])

    def valence(self, word: str) -> float:
        """The lexicon's value of a word, about -4 to 4; 0 if it has none."""
        return float(self._judge.lexicon.get(word.strip().lower(), 0.0))

    # --- training -------------------------------------------------------------------------------------------

    @cached_property
    def train_pairs(self) -> list[Encoded]:
        return self.encode_all(sentiment_pairs("train"))

    @cached_property
    def test_pairs(self) -> list[Encoded]:
        return self.encode_all(sentiment_pairs("test"))

    def encode_all(self, pairs: Sequence[SentimentPair]) -> list[Encoded]:
        found = [encode_pair(self.tokenizer, pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
        sides = [self.trunks([p.prompt + ids for p, ids in zip(found, responses, strict=True)])
                 for responses in ([p.chosen for p in found], [p.rejected for p in found])]  # fmt: skip
        return [Encoded(*each) for each in zip(found, zip(*sides, strict=True), strict=True)]

    def trunk(self, ids: Sequence[int]) -> Tensor:
        """What the frozen layers make of a text: float32 [S, d]."""
        return self.trunks([ids])[0]

    @torch.inference_mode()
    def trunks(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """`trunk` of many texts: batched, padded on the right where no token sees it."""
        whole: Any = self.model
        layers = whole.model.layers
        whole.model.layers = layers[:-TRAINED]
        norm, whole.model.norm = whole.model.norm, nn.Identity()
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        found: dict[int, Tensor] = {}
        try:
            for start in range(0, len(order), 2 * PAIRS):
                places = order[start : start + 2 * PAIRS]
                longest = len(texts[places[-1]])
                ids = torch.tensor([[*texts[place], *[0] * (longest - len(texts[place]))] for place in places])
                states = whole.model(input_ids=ids, use_cache=False).last_hidden_state
                found |= {p: row[: len(texts[p])].clone() for p, row in zip(places, states, strict=True)}
        finally:
            whole.model.layers, whole.model.norm = layers, norm
        return [found[place] for place in range(len(texts))]

    def collate(self, chosen: Sequence[Encoded], swapped: bool = False) -> Batch:
        """A batch for the last layers; `swapped` takes the rejected responses for the chosen ones."""
        pairs = [EncodedPair(e.pair.prompt, e.pair.rejected, e.pair.chosen) if swapped else e.pair for e in chosen]
        plain = collate(pairs)
        sides = (1, 0) if swapped else (0, 1)
        rows = [e.trunk[side] for side in sides for e in chosen]
        embeds = torch.zeros(*plain.input_ids.shape, rows[0].shape[1])
        for place, row in enumerate(rows):
            embeds[place, : len(row)] = row
        return Batch(plain.input_ids, plain.attention_mask, plain.mask, plain.scores, embeds)

    def read(self, policy: PreTrainedModel, batch: Batch, needs: Needs) -> Pairs:
        """Policy and reference over a batch."""
        found = read_reference(self.reference, batch, needs)
        return join_pairs(batch, found, read_policy(policy, batch, found, needs), needs)

    def begin(self, start: PreTrainedModel | None = None) -> tuple[PreTrainedModel, nn.ModuleList]:
        """A policy, begun as the reference or as `start`, and the part of it that is trained."""
        policy = copy.deepcopy(start or self.reference)
        policy.lm_head, policy.model.embed_tokens = self.reference.lm_head, self.reference.model.embed_tokens
        return policy, nn.ModuleList([policy.model.layers, policy.model.norm]).requires_grad_(True)

    def train(
        self,
        method: PreferenceMethod,
        epochs: float = 1,
        seed: int = 0,
        score: Callable[[Batch], Tensor] | None = None,
        swapped: bool = False,
        pairs: Sequence[Encoded] | None = None,
        start: PreTrainedModel | None = None,
        watch: Callable[[int, Pairs], None] | None = None,
    ) -> PreTrainedModel:
        """The last layers, begun as the reference's and trained with `method`.

        Args:
            score: gives the scores [2B, S - 1] of a batch to a method that needs them.
            swapped: prefer the rejected responses.
            start: begin from these layers instead.
            watch: called with every step's number and pairs.
        """
        data = list(pairs if pairs is not None else self.train_pairs)
        policy, trained = self.begin(start)
        if isinstance(method, nn.Module):
            trained.append(method)
        steps = max(1, round(epochs * len(data) / PAIRS))
        order = [row for epoch in range(int(epochs) + 1)
                 for row in random.Random(1000 * seed + epoch).sample(range(len(data)), len(data))]  # fmt: skip

        def loss(step: int) -> Tensor:
            rows = [data[place] for place in order[step * PAIRS : (step + 1) * PAIRS]]
            batch = self.collate(rows, swapped)
            if score is not None:
                batch = Batch(batch.input_ids, batch.attention_mask, batch.mask, score(batch), batch.embeds)
            pairs = self.read(policy, batch, method.needs)
            if watch is not None:
                watch(step, pairs)
            return method(pairs).loss.mean()

        fit(trained, loss, steps, LEARNING_RATE, warmup=0.1)
        return policy.requires_grad_(False)

    def dpo(self, seed: int = 0, beta: float = 0.1, epochs: float = 2, swapped: bool = False) -> PreTrainedModel:
        """The last layers after DPO, which several papers begin with; kept in the user's cache folder."""
        facts: list[Any] = [seed, beta, epochs, swapped, PAIRS, LEARNING_RATE, TRAINED, len(self.train_pairs)]
        facts.append(hashlib.sha256("".join(p.chosen for p in sentiment_pairs()).encode()).hexdigest())
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
        path = cache_folder() / "sentiment" / f"dpo-{key}.safetensors"
        if not path.exists():
            policy = self.train(DPO(beta), epochs, seed, swapped=swapped)
            kept = {n: p.contiguous() for n, p in policy.named_parameters() if ".layers." in n or ".norm." in n}
            with atomic_write(path, "wb") as out:
                out.write(save(kept))
            return policy
        policy = self._top(self.model)
        policy.load_state_dict(load_file(path), strict=False)
        return policy

    # --- measuring ------------------------------------------------------------------------------------------

    def whole(self, policy: PreTrainedModel) -> PreTrainedModel:
        """The whole model with the last layers of `policy`; what is below is shared, not copied."""
        own: Any = copy.copy(self.model)
        # What `let_read` put over the original's `forward` would run the original.
        for name in ("forward", "lets_read"):
            own.__dict__.pop(name, None)
        own._modules = dict(own._modules)
        inner: Any = copy.copy(own.model)
        inner._modules = dict(inner._modules)
        tops = copy.deepcopy(policy.model.layers)
        for place, layer in enumerate(tops, start=len(self.model.model.layers) - TRAINED):
            layer.self_attn.layer_idx = place
        inner._modules["layers"] = nn.ModuleList([*self.model.model.layers[:-TRAINED], *tops])
        inner._modules["norm"] = policy.model.norm
        own._modules["model"] = inner
        return own

    def text(self, ids: Sequence[int]) -> str:
        """What is judged of a continuation: its first sentence."""
        return first_sentence(str(self.tokenizer.decode(list(ids), skip_special_tokens=True)))

    def token_rewards(self, policy: PreTrainedModel, batch: Batch) -> Tensor:
        """log(policy / reference) of every response token: float32 [2B, S - 1], without gradient."""
        with torch.no_grad():
            return self.read(policy, batch, Needs()).log_ratio
