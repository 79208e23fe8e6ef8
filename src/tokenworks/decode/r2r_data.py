"""What a router learns from: where do a small and a large model part, and where does it matter?

1. The large model writes answers, greedily.
2. The small model reads them. Where its choice is the large model's next token there is nothing to route.
3. Everywhere else the large model goes on after the small model's choice to the end of the sentence, and a
   verifier compares that sentence with the one that the large model wrote: *neutral* or *divergent*.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenworks.core.errors import InputError
from tokenworks.core.files import atomic_write
from tokenworks.core.selftext import ROWS, SelfText, chat_marks, write_text
from tokenworks.core.session import Session
from tokenworks.core.training import Progress, quiet
from tokenworks.decode.draft_model import DraftModel
from tokenworks.decode.r2r import watched
from tokenworks.decode.r2r_routers import TOP
from tokenworks.decode.r2r_sentences import SENTENCE, Verifier, continue_sentences, same_words, sentence

FIRST_SEED = 1000
"""Of the answers that routers learn from; those that draft models learn from begin at 0."""


@dataclass
class RoutingData:
    """One entry for each token of the answers.

    Attributes:
        hidden: float16 [N, d], the state from which the small model chose.
        top_logits: float16 [N, k], its largest logits, falling; k is `TOP`, or the small model's whole vocabulary.
        index: int64 [N], its choice in its own vocabulary.
        mismatch: bool [N], whether that is not what the large model wrote.
        divergent: bool [N], whether it would have led elsewhere; only mismatches do.
        answer: int64 [N], the number of the row that the token is of, to split by.
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
    places: Sequence[int],
    verifier: Verifier = same_words,
    number: int = 0,
) -> RoutingData:
    """The entries of one text; the large model is asked for one sentence at every mismatch, and for nothing else.

    Args:
        tokens: the text.
        places: of the tokens that the large model chose, greedily; each at least 1.
        verifier: see `Verifier`; places of which it cannot tell are left out.
        number: what `RoutingData.answer` is to say.
    """
    states, logits = _read(small, tokens)
    before = torch.tensor(places) - 1  # what was felt at a place predicts the token after it
    states, logits = states[before], logits[before]
    index = logits.argmax(-1)
    chosen = small.vocabulary[index]
    mismatch = chosen != torch.tensor(tokens)[places]
    rows = mismatch.nonzero()[:, 0].tolist()
    labels = torch.zeros(len(places), dtype=torch.long)
    if rows:
        large.rollback(0)
        large.extend(tokens)
        above = [places[row] - 1 for row in rows]
        sentences = continue_sentences(large, tokenizer, above, chosen[rows].tolist(), len(tokens))
        large.rollback()
        for row, ours in zip(rows, sentences, strict=True):
            place = places[row]
            context = str(tokenizer.decode(list(tokens[:place])))
            verdict = verifier(context, ours, sentence(tokenizer, tokens[place:]))
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


def _read(small: DraftModel, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """At each place the small model's state [n, d] and its logits [n, U] for the token after it."""
    session, states, logits = watched(small), [], []

    def keep(_: Tensor, found: Tensor) -> None:
        assert session.hidden is not None
        states.append(session.hidden)
        logits.append(found[:, : len(small.vocabulary)])

    session.rollback(0)
    session.prefill(tokens, keep)
    return torch.cat(states), torch.cat(logits)


def answered_places(tokens: Sequence[int], free: Sequence[bool], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Places in a self-written row where the model chose a token of an answer whose sentence the row holds whole.

    Args:
        free: for each token whether the model chose it, in a request or in an answer.
    """
    _, between = chat_marks(tokenizer)
    found, answering = [], False
    for place in range(1, len(tokens) - SENTENCE + 1):
        begins = list(tokens[max(0, place - len(between)) : place]) == between
        answering = bool(free[place]) and (answering or begins or not between)
        if answering:
            found.append(place)
    return found


def build_routing_data(
    large: PreTrainedModel,
    small: DraftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    rows: int = 72,
    length: int = 256,
    verifier: Verifier = same_words,
    progress: Progress = quiet,
) -> RoutingData:
    """Routing data from requests that the large model invents, kept row by row in `folder`: a run that was cut off
    goes on, and one with more rows adds to it.

    Args:
        rows: of `length` tokens, at least 1.
        verifier: a folder is for one verifier.

    Raises:
        InputError: no rows, a row too short to hold a sentence, or no answer in any of them.
    """
    if rows < 1:
        raise InputError(f"rows: {rows} is not at least 1")
    if length <= SENTENCE:
        raise InputError(f"length: {length} tokens cannot hold a sentence of up to {SENTENCE}")
    session, mark, parts, text, written = Session(large), fingerprint(small), [], None, -1
    for row in range(rows):
        kept = folder / f"labels-{mark}-{row:04d}.safetensors"
        if not kept.exists():
            if text is None or written != row // ROWS:
                written = row // ROWS
                progress(row, rows, "writing answers")
                text = _answers(large, tokenizer, folder, length, written)
            tokens = text.tokens[row % ROWS].tolist()
            places = answered_places(tokens, text.free[row % ROWS].tolist(), tokenizer)
            if not places:
                continue
            label_answer(session, small, tokenizer, tokens, places, verifier, row).save(kept)
        parts.append(RoutingData.load(kept))
        progress(row + 1, rows, "labelling")
    if not parts:
        raise InputError(f"rows: none of the {rows} rows holds an answer; write more, or longer ones")
    return RoutingData.join(parts)


def _answers(
    large: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, length: int, number: int
) -> SelfText:
    path = folder / f"answers-{number:03d}.safetensors"
    if not path.exists():
        write_text(large, tokenizer, length, FIRST_SEED + number, ROWS, temperatures=(0.0,)).save(path)
    return SelfText.load(path)


def fingerprint(small: DraftModel) -> str:
    """Of the small model's weights and vocabulary: a router for other ones would be noise."""
    digest = hashlib.sha256(small.vocabulary.cpu().numpy().tobytes())
    for name, parameter in sorted(watched(small).model.named_parameters()):
        sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].float()
        # Rounded, so that the last bits of another machine's arithmetic do not matter.
        digest.update(name.encode() + (sample * 100).round().int().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
