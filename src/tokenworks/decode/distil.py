"""A draft model for a larger one: a few of its layers, distilled on text that it wrote itself.

The draft has the target's embeddings, both as input and, for the ids that the target writes most, as output. Only
the layers are trained and kept: the embeddings are the target's own when the draft is loaded. A head that knows a
quarter of the vocabulary is most of what makes the draft cheap, and costs no exactness: a token that it cannot
propose is one the target writes itself.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenworks.core.errors import InputError
from tokenworks.core.files import atomic_write
from tokenworks.core.selftext import SelfText, write_text
from tokenworks.core.session import Session
from tokenworks.core.training import Progress, fit, quiet
from tokenworks.decode.draft_model import DraftModel

VOCABULARY = 12288
"""Ids that the draft's head knows: of what SmolLM2 writes, 96% when greedy and 92% at temperature 1."""

BATCH = 8
"""Rows of self-written text a training step sees."""

CONFIG = "draft.json"
"""The file that tells a draft model's folder from other models'."""


def distil(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    layers: Sequence[int] = (0, 29),
    batches: int = 18,
    steps: int = 700,
    learning_rate: float = 1e-3,
    progress: Progress = quiet,
) -> dict[str, float]:
    """Make a draft model for `target` and write it to the folder `out`. A run that was cut off goes on.

    Args:
        target: a Llama-type model in float32.
        layers: which of its layers the draft begins with, in order.
        batches: of self-written text (`write_text`), of 48 rows of 384 tokens each; the last is held out.
        steps: of training, `BATCH` rows each.

    Returns:
        On the held-out rows: "overlap", the mean of sum_x min(p, q) at temperature 1, which is the probability
        that speculative sampling accepts; "agreement", how often both choose the same token when greedy;
        "coverage", the share of the target's probability that lies in the draft's vocabulary.

    Raises:
        InputError: fewer than two batches, or layers that the target does not have.
    """
    if batches < 2:
        raise InputError(f"batches: {batches} is not at least 2; the last is held out")
    unfinished = out / "unfinished"
    texts = []
    for number in range(batches):
        path = unfinished / f"text-{number:03d}.safetensors"
        if not path.exists():
            write_text(target, tokenizer, seed=number).save(path)
        texts.append(SelfText.load(path))
        progress(number + 1, batches, "writing text")
    vocabulary = frequent_ids(texts[:-1], target.get_output_embeddings().weight.shape[0])
    draft = small_copy(target, layers, vocabulary)
    rows = _Rows(texts[:-1], target, vocabulary)
    fit(
        draft,
        lambda step: rows.loss(draft, step),
        steps,
        learning_rate,
        unfinished / "training.pt",
        progress=progress,
    )
    found = _Rows(texts[-1:], target, vocabulary).quality(draft)
    save_draft(draft, vocabulary, layers, out, found)
    for path in unfinished.iterdir():
        path.unlink()
    unfinished.rmdir()
    return found


def frequent_ids(texts: Sequence[SelfText], vocab_size: int) -> Tensor:
    """The `VOCABULARY` ids that were written most, ascending; ids never written come last, the lowest first."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for text in texts:
        counts += torch.bincount(text.tokens[text.free], minlength=vocab_size)
    return counts.argsort(descending=True, stable=True)[:VOCABULARY].sort().values


def small_copy(target: PreTrainedModel, layers: Sequence[int], vocabulary: Tensor) -> PreTrainedModel:
    """A copy of `target` with only some layers, whose head knows only `vocabulary`; embeddings are shared.

    Raises:
        InputError: the target has no such layers.
    """
    core = target.get_decoder()
    stack = getattr(core, "layers", None)
    if stack is None or not layers or not 0 <= min(layers) <= max(layers) < len(stack):
        raise InputError(f"layers: {list(layers)} are not layers of a {type(target).__name__}")
    config = copy.deepcopy(target.config)
    config.num_hidden_layers, config.tie_word_embeddings = len(layers), False
    # Layers that are left out must not be copied only to be dropped.
    empty = {id(stack): nn.ModuleList(copy.deepcopy(stack[layer]) for layer in layers)}
    # Its own parameter on the same memory: what is frozen here must stay trainable in the target.
    shared = {
        id(weight): nn.Parameter(weight.detach(), requires_grad=False)
        for weight in target.get_input_embeddings().parameters()
    }
    draft = copy.deepcopy(target, memo={**empty, **shared})
    draft.config = draft.get_decoder().config = config
    for number, layer in enumerate(draft.get_decoder().layers):
        layer.self_attn.layer_idx = number
    head = nn.Linear(config.hidden_size, len(vocabulary), bias=False)
    head.weight = nn.Parameter(target.get_output_embeddings().weight[vocabulary].detach().clone())
    draft.set_output_embeddings(head)
    for parameter in draft.parameters():
        parameter.requires_grad_(False)
    for parameter in _own(draft).values():
        parameter.requires_grad_(True)
    return draft


def _own(draft: PreTrainedModel) -> dict[str, nn.Parameter]:
    """What belongs to the draft alone: its layers and the last norm."""
    return {name: p for name, p in draft.named_parameters() if re.search(r"layers\.|\bnorm\.", name)}


class _Rows:
    """Self-written rows, and what the target thought at each place."""

    def __init__(self, texts: Sequence[SelfText], target: PreTrainedModel, vocabulary: Tensor) -> None:
        self.tokens = torch.cat([text.tokens for text in texts])
        self.states = torch.cat([text.states for text in texts])
        self._head, self._vocabulary = target.get_output_embeddings().weight.detach(), vocabulary
        self._part = self._head[vocabulary]

    def loss(self, draft: PreTrainedModel, step: int) -> Tensor:
        """KL(q || p) over the draft's vocabulary, the target's q normalised there; mean over tokens."""
        random = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(self.tokens), (BATCH,), generator=random)
        with torch.no_grad():
            q = torch.softmax(self.states[chosen].float() @ self._part.T, dim=-1)
        log_p = torch.log_softmax(draft(input_ids=self.tokens[chosen], use_cache=False).logits, dim=-1)
        return (q * (q.clamp(min=1e-9).log() - log_p)).sum(-1).mean()

    @torch.inference_mode()
    def quality(self, draft: PreTrainedModel) -> dict[str, float]:
        """See `distil`."""
        sums = torch.zeros(3)
        for tokens, states in zip(self.tokens, self.states, strict=True):
            q = torch.softmax(states.float() @ self._head.T, dim=-1)
            p = torch.softmax(draft(input_ids=tokens[None], use_cache=False).logits[0], dim=-1)
            part = q[:, self._vocabulary]
            same = self._vocabulary[p.argmax(-1)] == q.argmax(-1)
            sums += torch.stack([torch.minimum(p, part).sum(-1).mean(), same.float().mean(), part.sum(-1).mean()])
        overlap, agreement, coverage = (sums / len(self.tokens)).tolist()
        return {"overlap": overlap, "agreement": agreement, "coverage": coverage}


def save_draft(
    draft: PreTrainedModel, vocabulary: Tensor, layers: Sequence[int], out: Path, found: dict[str, float]
) -> None:
    """Write what belongs to the draft: matrices as 8-bit integers with one scale a row, the rest as float32."""
    kept = {"vocabulary": vocabulary.int()}
    for name, parameter in _own(draft).items():
        weight = parameter.detach()
        if weight.dim() == 2:
            scale = weight.abs().amax(1, keepdim=True) / 127
            kept[f"{name}:scale"] = scale
            kept[name] = (weight / scale).round().to(torch.int8)
        else:
            kept[name] = weight
    with atomic_write(out / "model.safetensors", "wb") as file:
        file.write(save(kept))
    with atomic_write(out / CONFIG) as text:
        json.dump({"layers": list(layers), "held_out": found}, text, indent=1)


def load_draft(target: PreTrainedModel, vocab_size: int, folder: Path | None = None) -> DraftModel:
    """The draft model that `distil` wrote; by default the one for SmolLM2-135M that comes with tokenworks.

    Args:
        target: the model it was distilled from, whose embeddings it shares.
        vocab_size: V, the width of the target's logits.

    Raises:
        InputError: the folder holds no draft model, or one for another target.
    """
    place = (
        Path(str(files("tokenworks.decode").joinpath("weights", "draft-smollm2-135m")))
        if folder is None
        else folder
    )
    try:
        kept = load_file(place / "model.safetensors")
        layers = json.loads((place / CONFIG).read_text())["layers"]
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"draft-model: {place} holds no draft model that `tokenworks train draft` wrote ({error})"
        ) from error
    vocabulary = kept.pop("vocabulary").long()
    try:
        draft = small_copy(target, layers, vocabulary)
        own = _own(draft)
        for name, parameter in own.items():
            scale = kept.get(f"{name}:scale")
            parameter.data.copy_(kept[name] if scale is None else kept[name] * scale)
    except (KeyError, RuntimeError, InputError) as error:
        raise InputError(
            f"draft-model: {place.name} was made for another target; distil one for this with "
            f"`tokenworks train draft`, and name it with --draft-model ({error})"
        ) from error
    return DraftModel(Session(draft), vocab_size, vocabulary)
