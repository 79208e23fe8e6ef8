"""A router's training: where do a small and a large model part, where does it matter, and how would one know?

1. The large model writes answers, greedily.
2. The small model reads them. Where its choice is the large model's next token there is nothing to route.
3. Everywhere else the large model goes on after the small model's choice to the end of the sentence, and a
   verifier compares that sentence with the one that the large model wrote: *neutral* or *divergent*.
4. The router learns to tell the divergent places from all others by what the small model felt there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenworks.core.errors import InputError
from tokenworks.core.files import atomic_write
from tokenworks.core.selftext import SelfText, chat_marks, write_text
from tokenworks.core.session import Session
from tokenworks.core.training import Progress, fit, quiet
from tokenworks.core.tree import TokenTree, TreeShape
from tokenworks.decode.draft_model import DraftModel
from tokenworks.decode.r2r import TOP, TokenRouter

Verifier = Callable[[str, str, str], int | None]
"""Takes the text before, the sentence with the small model's token and that of the large model; returns 1 if they
say different things, 0 if not, None if it cannot tell (the place is then left out)."""

SENTENCE = 16
"""Tokens after which a sentence is compared even if it has not ended."""

SAME_WORDS = 0.75
"""Share of words that two sentences must have in common to say the same."""

CONFIG = "router.json"


def same_words(context: str, ours: str, theirs: str) -> int:
    """The verifier that needs no third model: divergent if fewer than `SAME_WORDS` of the words are the same (the
    harmonic mean of both shares). The paper asks a model of 72 billion parameters."""
    one, other = (Counter(re.findall(r"\w+|[^\w\s]", text.lower())) for text in (ours, theirs))
    total = sum(one.values()) + sum(other.values())
    return int(total > 0 and 2 * sum((one & other).values()) / total < SAME_WORDS)


@dataclass
class RoutingData:
    """One entry for each token of the answers.

    Attributes:
        hidden: float16 [N, d], the state from which the small model chose.
        top_logits: float16 [N, TOP], its largest logits, falling.
        index: int64 [N], its choice in its own vocabulary.
        mismatch: bool [N], whether that is not what the large model wrote.
        divergent: bool [N].
        answer: int64 [N], the number of the answer, to split by.
    """

    hidden: Tensor
    top_logits: Tensor
    index: Tensor
    mismatch: Tensor
    divergent: Tensor
    answer: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, chosen: Tensor) -> RoutingData:
        return RoutingData(*(getattr(self, f.name)[chosen] for f in fields(self)))

    @classmethod
    def join(cls, parts: Sequence[RoutingData]) -> RoutingData:
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    def save(self, path: Path) -> None:
        with atomic_write(path, "wb") as out:
            out.write(save({f.name: getattr(self, f.name).contiguous() for f in fields(self)}))

    @classmethod
    def load(cls, path: Path) -> RoutingData:
        return cls(**load_file(path))


@torch.inference_mode()
def label_answer(
    large: Session,
    small: DraftModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[int],
    answered: Sequence[int],
    verifier: Verifier = same_words,
    number: int = 0,
) -> RoutingData:
    """The entries of one text.

    Args:
        tokens: the text; `answered` are the places of the tokens that the large model chose, greedily.
    """
    places = [place for place in answered if place >= 1]
    parts: list[Tensor] = []
    small.session.keep_hidden = True  # type: ignore[attr-defined]
    small.session.rollback(0)
    hidden: list[Tensor] = []

    def read(_: Tensor, logits: Tensor) -> None:
        parts.append(logits[:, : len(small.vocabulary)])
        hidden.append(small.session.hidden)  # type: ignore[attr-defined]

    small.session.prefill(tokens, read)
    before = torch.tensor(places) - 1  # features at a place predict the token after it
    logits, states = torch.cat(parts)[before], torch.cat(hidden)[before]
    index = logits.argmax(-1)
    chosen = small.vocabulary[index]
    mismatch = chosen != torch.tensor(tokens)[places]
    where = [place for place, other in zip(places, mismatch.tolist(), strict=True) if other]
    sentences = continue_sentences(large, tokenizer, tokens, where, chosen[mismatch].tolist())
    labels = torch.zeros(len(places), dtype=torch.long)
    for row, place, ours in zip(mismatch.nonzero()[:, 0].tolist(), where, sentences, strict=True):
        theirs = _sentence(tokenizer, tokens[place:])
        verdict = verifier(str(tokenizer.decode(list(tokens[:place]))), ours, theirs)
        labels[row] = -1 if verdict is None else verdict
    data = RoutingData(
        states.half(),
        logits.topk(min(TOP, logits.shape[1])).values.half(),
        index,
        mismatch,
        labels == 1,
        torch.full((len(places),), number),
    )
    return data[labels >= 0]


def continue_sentences(
    large: Session,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[int],
    places: Sequence[int],
    firsts: Sequence[int],
) -> list[str]:
    """For each place the sentence that the large model, greedily, makes of another first token there.

    The text and all its continuations are one token tree: every pass adds a token to each that has not ended.
    """
    if not places:
        return []
    large.rollback(0)
    large.extend(tokens)
    written = [[first] for first in firsts]
    above = [place - 1 for place in places]
    alive = [number for number, first in enumerate(firsts) if not ends_sentence(tokenizer, first)]
    for _ in range(SENTENCE - 1):
        if not alive:
            break
        first = large.pending
        shape = TreeShape(tuple(above[number] for number in alive), first)
        logits = large.extend(TokenTree(torch.tensor([written[number][-1] for number in alive]), shape))
        for node, (number, token) in enumerate(zip(alive, logits.argmax(-1).tolist(), strict=True), start=first):
            above[number] = node
            written[number].append(token)
        alive = [number for number in alive if not ends_sentence(tokenizer, written[number][-1])]
    large.rollback()
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in written]


def ends_sentence(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether a token is a separator: the end of a text, of a sentence or of a line."""
    if token in tokenizer.all_special_ids:
        return True
    text = str(tokenizer.decode([token]))
    return "\n" in text or text.rstrip().endswith((".", "!", "?", ":", ";"))


def _sentence(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    taken: list[int] = []
    for token in tokens[:SENTENCE]:
        taken.append(token)
        if ends_sentence(tokenizer, token):
            break
    return str(tokenizer.decode(taken, skip_special_tokens=True))


def answered_places(tokens: Sequence[int], free: Sequence[bool], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Places in a self-written row where the model chose a token of an answer."""
    _, between = chat_marks(tokenizer)
    found, answering = [], not between
    for place in range(len(tokens)):
        if between and list(tokens[max(0, place - len(between)) : place]) == between:
            answering = True
        if answering and free[place]:
            found.append(place)
            answering = not between or tokens[place] != between[0]
    return found


def build_routing_data(
    large: PreTrainedModel,
    small: DraftModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    rows: int = 48,
    length: int = 256,
    verifier: Verifier = same_words,
    progress: Progress = quiet,
) -> RoutingData:
    """Steps 1 to 3, kept row by row in the folder `out`, so that a run that was cut off goes on."""
    path = out / "answers.safetensors"
    if not path.exists():
        write_text(large, tokenizer, length, seed=1000, rows=rows, temperatures=(0.0,)).save(path)
    text, session, parts = SelfText.load(path), Session(large), []
    for row in range(rows):
        kept = out / f"labels-{row:03d}.safetensors"
        if not kept.exists():
            tokens = text.tokens[row].tolist()
            places = answered_places(tokens, text.free[row].tolist(), tokenizer)
            if len(places) > 1:
                label_answer(session, small, tokenizer, tokens, places, verifier, row).save(kept)
        if kept.exists():
            parts.append(RoutingData.load(kept))
        progress(row + 1, rows, "labelling")
    return RoutingData.join(parts)


def train_router(
    small: DraftModel,
    data: RoutingData,
    steps: int = 400,
    learning_rate: float = 3e-4,
    width: int = 256,
    depth: int = 2,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Progress = quiet,
) -> tuple[TokenRouter, dict[str, float]]:
    """Step 4: binary cross-entropy, divergent places weighted up to the weight of the others.

    Every fifth answer is held out; the threshold is found there (`calibrate`).

    Returns:
        The router, and on the held-out answers: "auc", "recall", "false_positives", "share" routed, and the shares
        "identical", "neutral" and "divergent" of all data.

    Raises:
        InputError: no divergent places, or no others, to learn from.
    """
    held = data.answer % 5 == 4
    train, test = data[~held], data[held]
    positives = int(train.divergent.sum())
    if positives in (0, len(train)) or not 0 < int(test.divergent.sum()) < len(test):
        raise InputError(
            f"data: {positives} of {len(train)} training tokens are divergent; a router needs both kinds, also in "
            "every fifth answer, which is held out. Label more answers"
        )
    torch.manual_seed(seed)
    router = TokenRouter(_embeddings(small), data.hidden.shape[1], width, depth)
    weight = torch.tensor((len(train) - positives) / positives)

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(train), (1024,), generator=torch.Generator().manual_seed(seed * 100_003 + step))
        batch = train[rows]
        router.train()
        logits = router(batch.hidden.float(), batch.top_logits.float(), batch.index)
        return binary_cross_entropy_with_logits(logits, batch.divergent.float(), pos_weight=weight)

    fit(router, loss, steps, learning_rate, checkpoint, weight_decay=5e-4, progress=progress)
    router.eval()
    with torch.inference_mode():
        scores = torch.sigmoid(router(test.hidden.float(), test.top_logits.float(), test.index))
    router.threshold = calibrate(scores, test.divergent)
    routed = scores >= router.threshold
    found = {
        "auc": auc(scores, test.divergent),
        "recall": float(routed[test.divergent].float().mean()),
        "false_positives": float((routed & ~test.divergent).float().mean()),
        "share": float(routed.float().mean()),
        "identical": float((~data.mismatch).float().mean()),
        "neutral": float((data.mismatch & ~data.divergent).float().mean()),
        "divergent": float(data.divergent.float().mean()),
    }
    return router, found


def calibrate(scores: Tensor, divergent: Tensor, min_recall: float = 0.95, max_false: float = 0.1) -> float:
    """The threshold with the fewest false alarms among those that find enough of the divergent places.

    Args:
        scores: float [N]; divergent: bool [N].
        min_recall: share of divergent places to find.
        max_false: false alarms by all tokens that are borne; if no threshold meets both, this one gives way.
    """
    rows = []
    for threshold in torch.linspace(0.01, 0.99, 100).tolist():
        routed = scores >= threshold
        recall = float(routed[divergent].float().mean())
        false = float((routed & ~divergent).float().mean())
        rows.append((false, -threshold, recall))
    enough = [row for row in rows if row[2] >= min_recall]
    chosen = [row for row in enough if row[0] <= max_false] or enough
    return -min(chosen)[1] if chosen else 0.5


def auc(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive scores above a negative, ties counting half."""
    order = torch.cat([scores[positive], scores[~positive]]).double()
    _, places, counts = order.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[places]
    n, m = int(positive.sum()), int((~positive).sum())
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def fingerprint(small: DraftModel) -> str:
    """Of the small model's weights: a router for other ones would be noise."""
    model: nn.Module = small.session.model  # type: ignore[attr-defined]
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)]
        digest.update(name.encode() + (sample * 1000).round().int().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_router(router: TokenRouter, small: DraftModel, out: Path, found: dict[str, float]) -> None:
    """Write the router's own weights in half precision, and which small model it is for."""
    kept = {name: p.detach().half().contiguous() for name, p in router.named_parameters()}
    with atomic_write(out / "model.safetensors", "wb") as file:
        file.write(save(kept))
    width, depth = router.leave[1].in_features, len(router.blocks)
    facts = {
        "width": width,
        "depth": depth,
        "threshold": router.threshold,
        "small": fingerprint(small),
        "held_out": found,
    }
    with atomic_write(out / CONFIG) as text:
        json.dump(facts, text, indent=1)


def load_router(small: DraftModel, folder: Path | None = None) -> TokenRouter:
    """The router that was trained for `small`; by default the one for SmolLM2-135M's draft model.

    Raises:
        InputError: the folder holds no router, or one for another small model.
    """
    place = folder or Path(str(files("tokenworks.decode").joinpath("weights", "router-smollm2-135m")))
    try:
        facts = json.loads((place / CONFIG).read_text())
        kept = load_file(place / "model.safetensors")
    except (OSError, ValueError) as error:
        raise InputError(
            f"router: {place} holds no router that `tokenworks train router` wrote ({error})"
        ) from error
    if facts["small"] != fingerprint(small):
        raise InputError(
            f"router: {place.name} was trained for another small model; train one with `tokenworks train router`"
        )
    table = _embeddings(small)
    hidden = kept["enter.0.weight"].shape[1] - 2 * table.shape[1]
    router = TokenRouter(table, hidden, facts["width"], facts["depth"], facts["threshold"])
    router.load_state_dict({name: weight.float() for name, weight in kept.items()})
    return router.eval()


def _embeddings(small: DraftModel) -> Tensor:
    model: PreTrainedModel = small.session.model  # type: ignore[attr-defined]
    table: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return table[small.vocabulary]
