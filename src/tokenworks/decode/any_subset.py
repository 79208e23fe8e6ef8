"""Any-subset autoregressive models (XLNet's two streams): every order of the holes, one network.

Such a model gives p(x_i | any subset of the other tokens). The holes of a text are filled in one admissible
order, the lattice order of ASSD (arXiv 2504.20456, after Shih et al.): visible positions first, then the holes
from left to right.

    rank   place of each position in that order; the first `start` ranks are visible
    oracle mask   a hole sees the visible tokens and the holes before it: one pass gives the whole joint density
    draft mask    with n ranks decided, every other hole sees just those: one pass drafts many holes at once

A content stream carries what stands at a position, a query stream predicts it without having seen it.
"""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedTokenizerBase, XLNetConfig, XLNetLMHeadModel

from tokenworks.core.convert import no_bars
from tokenworks.core.corpus import pack, python_docs, train_bpe, windows
from tokenworks.core.errors import InputError
from tokenworks.core.training import Progress, fit, quiet, save_small

MASK, END = "<mask>", "<end>"
"""Special tokens: of a hole, and between documents."""

MASK_ID, END_ID = 0, 1
"""Their ids."""

LENGTH = 128
"""Tokens of a training text."""

BATCH = 8
"""Texts of a training step; they share one order."""

RATES = (0.5, 0.99)
"""Share of a training text that is masked, drawn uniformly between these once the schedule has warmed up."""

FIRST_RATE, WARMUP = 0.15, 0.1
"""The share masked at the first step, and the share of the steps over which it grows to `RATES`."""


class AnySubsetLM(Protocol):
    """What ASSD asks of a model.

    Attributes:
        vocab_size: V.
        mask_token_id: the id that stands in a hole.
        max_length: N may be at most this.
    """

    vocab_size: int
    mask_token_id: int
    max_length: int

    def logits(self, tokens: Tensor, forbidden: Tensor, targets: Tensor) -> Tensor:
        """Of the tokens at some positions, each predicted without being seen.

        Args:
            tokens: int64 [N].
            forbidden: bool [N, N]; entry (i, j) keeps position i from seeing position j.
            targets: int64 [K] positions.

        Returns:
            float [K, V].
        """


class XLNet:
    """A Transformers XLNet as an `AnySubsetLM`.

    Args:
        model: with its language-modelling head.
        mask_token_id: the id that stands in a hole.
        max_length: the longest text it was trained on.
    """

    def __init__(self, model: XLNetLMHeadModel, mask_token_id: int, max_length: int = LENGTH) -> None:
        self.model = model.eval()
        self.mask_token_id, self.max_length = mask_token_id, max_length
        self.vocab_size: int = model.config.vocab_size

    @torch.no_grad()
    def logits(self, tokens: Tensor, forbidden: Tensor, targets: Tensor) -> Tensor:
        return two_stream_logits(self.model, tokens[None], forbidden, targets)[0]


def two_stream_logits(model: XLNetLMHeadModel, tokens: Tensor, forbidden: Tensor, targets: Tensor) -> Tensor:
    """The logits [B, K, V] of `targets` [K] in texts [B, N] that share one mask [N, N]."""
    batch, length = tokens.shape
    mapping = torch.zeros(batch, len(targets), length)
    mapping[:, torch.arange(len(targets)), targets] = 1
    mask = forbidden.to(mapping.dtype).expand(batch, -1, -1)
    found: Tensor = model(input_ids=tokens, perm_mask=mask, target_mapping=mapping, use_mems=False).logits
    return found


def lattice_order(holes: Tensor) -> tuple[Tensor, int]:
    """The admissible order: visible positions from left to right, then the holes from left to right.

    Args:
        holes: bool [N].

    Returns:
        The rank of each position, int64 [N], and the number of visible positions, which is the first hole's rank.
    """
    start = int((~holes).sum())
    rank = torch.where(holes, start + holes.cumsum(0) - 1, (~holes).cumsum(0) - 1)
    return rank, start


def oracle_mask(rank: Tensor, start: int) -> Tensor:
    """bool [N, N], true where i may not see j: unless j comes before i, or both are visible.

    Visible tokens see each other in full, since nobody asks for their density.
    """
    visible = rank < start
    return (rank[:, None] <= rank) & ~(visible[:, None] & visible)


def draft_mask(rank: Tensor, start: int, decided: int) -> Tensor:
    """The oracle mask once all ranks from `decided` on are as one: each of them sees just what is decided.

    What is decided keeps its own view, so that its content is the oracle's.
    """
    return oracle_mask(torch.where(rank < decided, rank, len(rank)), start)


def any_subset_loss(model: XLNetLMHeadModel, tokens: Tensor, holes: Tensor) -> Tensor:
    """-log p(holes | the rest) / number of holes, mean over texts.

    Args:
        tokens: int64 [B, N], complete texts.
        holes: bool [N], the same for all texts; at least one, and not all.
    """
    rank, start = lattice_order(holes)
    targets = holes.nonzero()[:, 0]
    logits = two_stream_logits(model, tokens, oracle_mask(rank, start), targets)
    return cross_entropy(logits.flatten(0, 1), tokens[:, targets].flatten())


def masking_rate(step: int, steps: int, place: float) -> float:
    """The share to mask at a step: `place` in [0, 1] of the way between bounds that grow over the first steps."""
    grown = min(1.0, step / max(1, WARMUP * steps))
    low, high = (FIRST_RATE + grown * (rate - FIRST_RATE) for rate in RATES)
    return low + place * (high - low)


def some_holes(step: int, steps: int, length: int, random: torch.Generator) -> Tensor:
    """bool [length]: a random subset for a training step. Four steps in a row take a quarter of the rates each."""
    place = (step % 4 + float(torch.rand(1, generator=random))) / 4
    visible = max(1, math.ceil((1 - masking_rate(step, steps, place)) * length))
    holes = torch.ones(length, dtype=torch.bool)
    holes[torch.randperm(length, generator=random)[: min(visible, length - 1)]] = False
    return holes


def train_any_subset(
    out: Path, steps: int = 1200, learning_rate: float = 1e-3, seed: int = 0, progress: Progress = quiet
) -> dict[str, float]:
    """Train a small any-subset model on Python's documentation, and write it to the folder `out`.

    A run that was cut off goes on. XLNet with 6 layers of width 256: 3.8 million parameters.

    Args:
        steps: of `BATCH` texts of `LENGTH` tokens.
        seed: of the weights and of what is drawn.

    Returns:
        Nats a masked token on held-out texts, with 95% and with 50% masked.
    """
    train, test = python_docs("train"), python_docs("test")
    tokenizer = train_bpe(train, 1024, [MASK, END])
    torch.manual_seed(seed)
    config = XLNetConfig(
        vocab_size=len(tokenizer), d_model=256, n_layer=6, n_head=4, d_inner=512, dropout=0.0, mem_len=None
    )
    model = XLNetLMHeadModel(config).train()
    stream = pack(train, tokenizer, END_ID)

    def loss_at(step: int) -> Tensor:
        random = torch.Generator().manual_seed(1_000_003 * seed + step)
        rows = windows(stream, BATCH, LENGTH, random)
        return any_subset_loss(model, rows, some_holes(step, steps, LENGTH, random))

    fit(model, loss_at, steps, learning_rate, out / "training.pt", weight_decay=0.01, progress=progress)
    found = held_out(model.eval(), pack(test, tokenizer, END_ID))
    save_small(model, tokenizer, out)
    return found


@torch.inference_mode()
def held_out(model: XLNetLMHeadModel, stream: Tensor, batches: int = 12) -> dict[str, float]:
    """Nats a masked token, with 95% and 50% of each text masked, over as many batches of texts."""
    found = {}
    for rate in (0.95, 0.5):
        losses = []
        for number in range(batches):
            random = torch.Generator().manual_seed(number)
            rows = windows(stream, BATCH, LENGTH, random)
            holes = torch.randperm(LENGTH, generator=random) < round(rate * LENGTH)
            losses.append(float(any_subset_loss(model, rows, holes)))
        found[f"nats at {rate:.0%} masked"] = sum(losses) / len(losses)
    return found


def load_any_subset(folder: Path | None = None) -> tuple[XLNet, PreTrainedTokenizerBase]:
    """The model that `train_any_subset` wrote, with its tokenizer; by default the one that comes with tokenworks.

    Raises:
        InputError: the folder holds no such model.
    """
    place = Path(str(files("tokenworks.decode").joinpath("weights", "any-subset"))) if folder is None else folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
        with no_bars():
            model = XLNetLMHeadModel.from_pretrained(place, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"folder: {place} holds no any-subset model that `tokenworks train any-subset` wrote"
        ) from error
    return XLNet(model, MASK_ID), tokenizer
