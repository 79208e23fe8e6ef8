"""A masked-diffusion language model: all masked slots are predicted at once, each token seeing all others.

It is trained to fill in tokens that were masked at a random rate t, every masked token weighed by 1/t (LLaDA,
arXiv 2502.09992). Here it is a small Llama whose attention looks both ways. As Dream does, it begins as a
causal model and keeps that model's habit of predicting a token at the position before it, so that what was
learnt is kept. A smaller causal model is trained beside it, to guide it. Both see two kinds of text: additions
with their carries written out, and Python's documentation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tokenworks.core.architectures import cache_argument
from tokenworks.core.convert import no_bars
from tokenworks.core.corpus import pack, python_docs, train_bpe, windows
from tokenworks.core.errors import InputError
from tokenworks.core.files import atomic_write
from tokenworks.core.packing import inference_view
from tokenworks.core.session import SlotCache
from tokenworks.core.training import Progress, fit, quiet, save_small

MASK, END = "<mask>", "<end>"
"""Special tokens: of a masked slot, and after the last token of a text."""

MASK_ID, END_ID = 0, 1
"""Their ids."""

VOCABULARY = 512

DIGITS = 3
"""Digits of the numbers that are added."""

EXAMPLES, LENGTH = 3, 192
"""Problems in a training row of additions, and tokens in a row of documentation."""

TOKENS = 1152
"""Tokens of a training step."""


class MaskedDiffusionLM(Protocol):
    """What the samplers ask of a model.

    Attributes:
        vocab_size: V.
        mask_token_id: the id that stands in a masked slot.
        shifted: whether the prediction for slot i stands at position i - 1 (Dream), not at i (LLaDA).
    """

    vocab_size: int
    mask_token_id: int
    shifted: bool

    def logits(self, tokens: Tensor, start: int, cache: SlotCache) -> Tensor:
        """Run positions `start` to the end of `tokens` [L]; `cache` holds what came before, and takes what is new.

        Returns:
            float [L - start, V].
        """


class BidirectionalLlama:
    """A Transformers decoder whose attention is not causal, as a `MaskedDiffusionLM`.

    Args:
        model: its attention must take an additive mask [1, 1, Q, K].
        mask_token_id: the id that stands in a masked slot.
        shifted: see `MaskedDiffusionLM`.
    """

    def __init__(self, model: PreTrainedModel, mask_token_id: int, shifted: bool = False) -> None:
        self.model, self._view = model.eval(), inference_view(model)
        self.mask_token_id, self.shifted = mask_token_id, shifted
        self.vocab_size: int = model.config.vocab_size
        self._cache_argument = cache_argument(self._view)

    @torch.no_grad()
    def logits(self, tokens: Tensor, start: int, cache: SlotCache) -> Tensor:
        width = len(tokens) - start
        cache.begin(start, width)
        found: Tensor = self._view(
            input_ids=tokens[None, start:],
            position_ids=torch.arange(start, len(tokens))[None],
            attention_mask=self._bias(start, len(tokens)),
            use_cache=True,
            **{self._cache_argument: cache},
        ).logits
        return found[0]

    def _bias(self, start: int, end: int) -> Tensor:
        """What to add to the scores [1, 1, end - start, end]: nothing, everyone sees everyone."""
        return torch.zeros(1, 1, end - start, end)


def addition(number: int, digits: int = DIGITS) -> tuple[str, str]:
    """Problem `number`: the question, and the answer with a step for each digit, from the right.

    "583+764=" and "3+4+0=07,8+6+0=14,5+7+1=13;1347": a step adds two digits and the carry.
    """
    chance = random.Random(number)
    a, b = (chance.randrange(10**digits) for _ in range(2))
    question, steps, carry = f"{a:0{digits}}+{b:0{digits}}=", [], 0
    for place in range(digits):
        left, right = a // 10**place % 10, b // 10**place % 10
        total = left + right + carry
        steps.append(f"{left}+{right}+{carry}={total:02}")
        carry = total // 10
    return question, f"{','.join(steps)};{a + b:0{digits + 1}}\n"


@dataclass(frozen=True)
class _Batch:
    """Rows of tokens [B, L], and which of them may be masked [B, L]."""

    tokens: Tensor
    maskable: Tensor


class _Data:
    """Training rows: documentation at every third step, additions at the others."""

    def __init__(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._tokenizer, self._seed = tokenizer, seed
        self._stream = pack(texts, tokenizer, END_ID)

    def at(self, step: int) -> _Batch:
        if step % 3 == 2:
            chance = torch.Generator().manual_seed(1_000_003 * self._seed + step)
            rows = windows(self._stream, TOKENS // LENGTH, LENGTH, chance)
            return _Batch(rows, torch.ones_like(rows, dtype=torch.bool))
        # Problems 0 to 9,999 are kept for tests.
        count = TOKENS // (EXAMPLES * len("".join(addition(0))))
        begin = 10_000 + (1_000_003 * self._seed + step) * count * EXAMPLES
        return self.problems(range(begin, begin + count * EXAMPLES))

    def problems(self, numbers: Sequence[int]) -> _Batch:
        """Rows of `EXAMPLES` problems each; only the answers may be masked, since questions cannot be guessed."""
        ids, maskable = [], []
        for number in numbers:
            for text, flag in zip(addition(number), (False, True), strict=True):
                part = self._tokenizer(text)["input_ids"]
                ids += part
                maskable += [flag] * len(part)
        rows = len(numbers) // EXAMPLES
        return _Batch(torch.tensor(ids).view(rows, -1), torch.tensor(maskable).view(rows, -1))


def diffusion_loss(model: PreTrainedModel, batch: _Batch, mask_token_id: int, chance: torch.Generator) -> Tensor:
    """E_t (1/t) sum of -log p(x_i | what is left) over tokens masked at rate t, by the number of maskable ones.

    Slot i is predicted at position i - 1. The rates of the rows are spread evenly over (0, 1].
    """
    rows = len(batch.tokens)
    t = (torch.arange(rows) + torch.rand(rows, generator=chance)[torch.randperm(rows, generator=chance)]) / rows
    t = t.clamp(min=0.05)[:, None]
    masked = (torch.rand(batch.tokens.shape, generator=chance) < t) & batch.maskable
    masked[:, 0] = False
    noisy = batch.tokens.masked_fill(masked, mask_token_id)
    everyone = torch.zeros(rows, 1, *[batch.tokens.shape[1]] * 2)
    logits = model(input_ids=noisy, attention_mask=everyone, use_cache=False).logits
    nats = cross_entropy(logits[:, :-1][masked[:, 1:]], batch.tokens[masked], reduction="none")
    weight = (1 / t).expand_as(masked)[masked]
    return (nats * weight).sum() / batch.maskable.sum()


def causal_loss(model: PreTrainedModel, batch: _Batch) -> Tensor:
    """-log p of the next token, over the same tokens."""
    logits = model(input_ids=batch.tokens, use_cache=False).logits[:, :-1]
    wanted = batch.maskable[:, 1:]
    return cross_entropy(logits[wanted], batch.tokens[:, 1:][wanted])


def train_masked_diffusion(
    out: Path,
    steps: int = 1500,
    causal_steps: int = 900,
    learning_rate: float = 1.5e-3,
    seed: int = 0,
    progress: Progress = quiet,
) -> dict[str, float]:
    """Train the diffusion model and its guide, and write them to the folders `out`/diffusion and `out`/guide.

    A run that was cut off goes on. 3.9 and 1.4 million parameters.

    Args:
        steps: of each of two rounds of diffusion training, `TOKENS` tokens each.
        causal_steps: of causal training before that, and of the guide's.
        seed: of the weights and of what is drawn.

    Returns:
        The last losses of both, mean over 50 steps of each kind of text.
    """
    tokenizer = train_bpe(python_docs("train"), VOCABULARY, [MASK, END], single_digits=True)
    data = _Data(python_docs("train"), tokenizer, seed)
    found: dict[str, float] = {}
    for name in ("diffusion", "guide"):
        if (out / name / "model.safetensors").exists():
            continue
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(name)).train()

        def causal(step: int, model: PreTrainedModel = model) -> Tensor:
            return causal_loss(model, data.at(step))

        def masked(step: int, model: PreTrainedModel = model, first: int = 0) -> Tensor:
            chance = torch.Generator().manual_seed(1_000_003 * seed + first + step)
            return diffusion_loss(model, data.at(causal_steps + first + step), MASK_ID, chance)

        # The second round begins with the learning rate of the first, which by then had come down to nothing.
        stages: list[tuple[str, Callable[[int], Tensor], int]] = [
            ("causal", causal, causal_steps),
            ("masked", masked, steps),
            ("again", partial(masked, first=steps), steps),
        ]
        for stage, loss_at, count in stages if name == "diffusion" else stages[:1]:
            losses = _stage(model, loss_at, count, learning_rate, out / f"{name}-{stage}", progress)
        before = causal_steps + steps if name == "diffusion" else 0
        for kind, first in (("additions", 0), ("documentation", 2)):
            last = losses[(first - before) % 3 :: 3][-50:]
            found[f"{name}, {kind}"] = sum(last) / max(1, len(last))
        save_small(model, tokenizer, out / name)
        for path in out.glob(f"{name}-*.done"):
            path.unlink()
    return found


def _stage(
    model: PreTrainedModel,
    loss_at: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
    place: Path,
    progress: Progress,
) -> list[float]:
    """One stage of training, which is not repeated once it is done: its weights and losses are kept."""
    done = place.with_suffix(".done")
    if done.exists():
        kept = torch.load(done, weights_only=True)
        model.load_state_dict(kept["model"])
        losses: list[float] = kept["losses"]
        return losses
    losses = fit(
        model, loss_at, steps, learning_rate, place.with_suffix(".pt"), weight_decay=0.01, progress=progress
    )
    with atomic_write(done, "wb") as file:
        torch.save({"model": model.state_dict(), "losses": losses}, file)
    return losses


def _config(name: str) -> LlamaConfig:
    width, inner, layers, heads = (256, 640, 5, 8) if name == "diffusion" else (192, 512, 3, 6)
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=None,
    )


def load_masked_diffusion(
    folder: Path | None = None,
) -> tuple[BidirectionalLlama, PreTrainedModel, PreTrainedTokenizerBase]:
    """The diffusion model that `train_masked_diffusion` wrote, its guide and their tokenizer.

    Args:
        folder: by default the models that come with tokenworks.

    Raises:
        InputError: the folder holds no such models.
    """
    shipped = Path(str(files("tokenworks.decode").joinpath("weights", "masked-diffusion")))
    place = shipped if folder is None else folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(place / "diffusion", local_files_only=True)
        with no_bars():
            model, guide = (
                LlamaForCausalLM.from_pretrained(place / name, local_files_only=True, dtype=torch.float32).eval()
                for name in ("diffusion", "guide")
            )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"folder: {place} holds no models that `tokenworks train masked-diffusion` wrote"
        ) from error
    return BidirectionalLlama(model, MASK_ID, shifted=True), guide, tokenizer
