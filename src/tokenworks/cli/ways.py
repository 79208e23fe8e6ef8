"""The ways in which `tokenworks generate` can write a text, each behind the same few facts."""

from __future__ import annotations

import math
from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenworks.core.errors import InputError

if TYPE_CHECKING:
    from tokenworks.core.models import LoadedModel
    from tokenworks.core.sampling import Sampling
    from tokenworks.core.trace import Trace

CONSTRAINED_TEMPERATURE = 1.0
"""The default under a constraint: a distribution is conditioned, and greedy choices are led into corners."""


@dataclass(frozen=True)
class Task:
    """What is to be written, and how much of it.

    Attributes:
        given: the prompt's bytes, which with --bytes may end inside a character.
        temperature: None if the user named none; each way has its own default.
        stream: given each piece of text as soon as it is confirmed.
    """

    prompt: str
    given: bytes
    raw: bool
    loaded: LoadedModel
    max_new_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int
    stream: Callable[[str], None]

    def ids(self, loaded: LoadedModel | None = None) -> list[int]:
        """The prompt in a model's own tokens and chat template, by default the first model's."""
        from tokenworks.core.text import encode_prompt

        return encode_prompt((loaded or self.loaded).tokenizer, self.prompt, self.raw)

    @property
    def stops(self) -> list[int]:
        from tokenworks.core.text import stop_ids

        return stop_ids(self.loaded.model, self.loaded.tokenizer)

    def sampling(self, default: float = 0.0) -> Sampling:
        from tokenworks.core.sampling import Sampling

        return Sampling(default if self.temperature is None else self.temperature, self.top_k, self.top_p)

    def token_stream(self) -> TokenStream:
        return TokenStream(self)


class TokenStream:
    """Passes on the text of tokens, whole characters at a time."""

    def __init__(self, task: Task) -> None:
        from transformers import TextStreamer

        class Into(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                task.stream(text)

        self._streamer = Into(task.loaded.tokenizer, skip_special_tokens=True)

    def __call__(self, tokens: list[int]) -> None:
        import torch

        for token in tokens:
            self._streamer.put(torch.tensor([token]))

    def end(self) -> None:
        self._streamer.end()


@dataclass(frozen=True)
class Written:
    """What every way of writing reports.

    Attributes:
        facts: for --json, beside the text.
        summary: one line.
        trace: makes the Trace, of which `channel` is shown in a terminal.
    """

    text: str
    facts: dict[str, Any]
    summary: str
    trace: Callable[[], Trace]
    channel: str
    meta: dict[str, Any] = field(default_factory=dict)


def speculative(
    task: Task, method: str, draft: str | None, verify: str | None, draft_model: str | None
) -> Written:
    """By a drafter and a verifier; plain decoding is a special case."""
    from tokenworks.core.session import Session
    from tokenworks.decode import decoder, open_draft

    tokenizer, session = task.loaded.tokenizer, Session(task.loaded.model)
    drafts = None if draft_model is None else open_draft(session, tokenizer, draft_model)
    decode = decoder(session, method, task.sampling(), draft=draft, verify=verify, draft_model=drafts)
    stream = task.token_stream()
    found = decode.generate(task.ids(), task.max_new_tokens, task.stops, task.seed, on_tokens=stream)
    stream.end()
    pair = f"{decode.drafter.name} + {decode.verifier.name}"
    return Written(
        str(tokenizer.decode(found.token_ids, skip_special_tokens=True)),
        {
            "token_ids": found.token_ids,
            "seconds": found.seconds,
            "tokens_per_second": found.tokens_per_second,
            "target_passes": found.target_passes,
            "method": method,
            "draft": decode.drafter.name,
            "verify": decode.verifier.name,
            "finish_reason": found.finish_reason,
        },
        f"{len(found.token_ids)} tokens in {found.target_passes} passes of the model, "
        f"{found.tokens_per_second:.1f} tokens/s ({pair}, {found.finish_reason})",
        lambda: found.trace(tokenizer),
        "source",
        {"method": method},
    )


@dataclass(frozen=True)
class Wanted:
    """The constraint that the user named; at most one of the three."""

    regex: str | None
    json_schema: Path | None
    grammar: Path | None

    def __post_init__(self) -> None:
        if len(self.names) > 1:
            raise InputError(f"{self.names[1]}: not together with --{self.names[0]}; name one constraint")

    @property
    def names(self) -> list[str]:
        pairs = {"regex": self.regex, "json-schema": self.json_schema, "grammar": self.grammar}
        return [name for name, value in pairs.items() if value is not None]

    def read(self) -> str:
        """What it says: the pattern, or the contents of the file.

        Raises:
            InputError: the file is not there, or not text.
        """
        if self.regex is not None:
            return self.regex
        path = self.json_schema or self.grammar
        assert path is not None
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
            raise InputError(f"{self.names[0]}: cannot read the file {path} ({why})") from error


def constrained(task: Task, wanted: Wanted, said: str, particles: int | None) -> Written:
    """Under a constraint: AWRS, with particles when sampling."""
    from tokenworks.core.session import Session
    from tokenworks.decode import constraint
    from tokenworks.decode.smc import SMC

    make = {"regex": constraint.regex, "json-schema": constraint.json_schema, "grammar": constraint.grammar}
    tokenizer, sampling = task.loaded.tokenizer, task.sampling(CONSTRAINED_TEMPERATURE)
    allowed = make[wanted.names[0]](said, tokenizer)
    number = particles if particles is not None else 1 if sampling.greedy else 5
    smc = SMC(Session(task.loaded.model), particles=number, sampling=sampling)
    found = smc.generate(task.ids(), allowed, task.max_new_tokens, task.stops, task.seed)
    best = found.best
    text = str(tokenizer.decode(list(best.text), skip_special_tokens=True))
    task.stream(text)
    others = {str(tokenizer.decode(list(tokens))): share for tokens, share in found.probabilities.items()}
    return Written(
        text,
        {
            "token_ids": list(best.text),
            "posterior": others,
            "log_evidence": found.log_evidence,
            "particles": number,
            "checks": found.checks,
            "target_passes": found.passes,
            "seconds": found.seconds,
            "constraint_seconds": found.constraint_seconds,
        },
        f"{len(best.text)} tokens in {found.passes} passes of the model, {found.checks} checks of the constraint, "
        f"{found.seconds:.2f} s ({number} particle{'s' * (number != 1)}, {len(others)} different text"
        f"{'s' * (len(others) != 1)})",
        lambda: found.trace(tokenizer),
        "wanted" if sampling.greedy else "forced",
        {"constraint": wanted.names[0]},
    )


def paused(task: Task, threshold: str | None) -> Written:
    """Greedily, with a look ahead where the model is unsure (AdaDec)."""
    from tokenworks.core.session import Session
    from tokenworks.decode.adadec import AdaDec
    from tokenworks.decode.adadec_threshold import load_threshold

    if task.temperature:
        raise InputError(f"temperature: {task.temperature}, but adadec is greedy and draws nothing; leave it out")
    if threshold is None or Path(threshold).suffix == ".json":
        limit: Any = load_threshold(task.loaded, threshold)
    else:
        limit = _number(threshold)
    tokenizer, stream = task.loaded.tokenizer, task.token_stream()
    found = AdaDec(Session(task.loaded.model), limit).generate(
        task.ids(), task.max_new_tokens, task.stops, on_tokens=stream
    )
    stream.end()
    return Written(
        str(tokenizer.decode(found.token_ids, skip_special_tokens=True)),
        {
            "token_ids": found.token_ids,
            "seconds": found.seconds,
            "target_passes": found.target_passes,
            "pause_rate": found.pause_rate,
            "changed": sum(step.rank > 0 for step in found.steps),
            "method": "adadec",
            "finish_reason": found.finish_reason,
        },
        f"{len(found.token_ids)} tokens in {found.target_passes} passes of the model, paused at "
        f"{found.pause_rate:.0%} of them, {found.tokens_per_second:.1f} tokens/s ({found.finish_reason})",
        lambda: found.trace(tokenizer),
        "decision",
        {"method": "adadec"},
    )


def _number(threshold: str) -> float:
    try:
        return float(threshold)
    except ValueError:
        raise InputError(f"threshold: {threshold!r} is not a number") from None


def routed(task: Task, small: str | None, router: Path | None, threshold: str | None) -> Written:
    """By a small model, and a large one for the tokens that a router hands over (R2R)."""
    from tokenworks.core.session import Session
    from tokenworks.decode import open_draft
    from tokenworks.decode.distil import load_draft
    from tokenworks.decode.r2r import RoutedDecoder
    from tokenworks.decode.r2r_training import load_router

    tokenizer, large = task.loaded.tokenizer, Session(task.loaded.model)
    own = small is None
    drafts = load_draft(large.model, large.vocab_size) if own else open_draft(large, tokenizer, str(small))
    limit = None if threshold is None else _number(threshold)
    decode = RoutedDecoder(drafts, large, load_router(drafts, router), limit, task.sampling())
    stream = task.token_stream()
    found = decode.generate(task.ids(), task.max_new_tokens, task.stops, task.seed, on_tokens=stream)
    stream.end()
    return Written(
        str(tokenizer.decode(found.token_ids, skip_special_tokens=True)),
        {
            "token_ids": found.token_ids,
            "routed": found.routed,
            "large_share": found.large_share,
            "activated_parameters": found.activated_parameters,
            "threshold": decode.threshold,
            "seconds": found.seconds,
            "finish_reason": found.finish_reason,
        },
        f"{len(found.token_ids)} tokens, {sum(found.routed)} of them by the large model, {found.seconds:.2f} s "
        f"({found.activated_parameters / 1e6:.0f}M parameters a token, {found.finish_reason})",
        lambda: found.trace(tokenizer),
        "writer",
        {"method": "r2r"},
    )


def by_bytes(task: Task, others: Sequence[str]) -> Written:
    """Byte by byte, by one model or by several with tokenizers of their own."""
    from tokenworks.core.models import load
    from tokenworks.core.session import Session
    from tokenworks.core.text import stop_ids
    from tokenworks.decode.byte_level import ByteEnsemble, ByteLM, chat_prefixes, write

    models = [task.loaded, *(load(name) for name in others)]
    readers = [ByteLM(Session(m.model), m.tokenizer, stop_ids(m.model, m.tokenizer)) for m in models]
    reader = readers[0] if len(readers) == 1 else ByteEnsemble(readers)
    chat = not task.raw and any(model.instruction_tuned for model in models)
    prefixes = chat_prefixes([model.tokenizer for model in models], task.prompt) if chat else None
    reader.start("" if chat else task.given, prefixes)
    decoder = getincrementaldecoder("utf-8")(errors="replace")
    found = write(
        reader,
        task.max_new_tokens,
        task.sampling(),
        task.seed,
        on_bytes=lambda piece: task.stream(decoder.decode(piece)),
    )
    names = [model.name for model in models]
    return Written(
        found.text,
        {
            "log_probs": found.log_probs,
            "bits_per_byte": -sum(found.log_probs) / math.log(2) / max(1, len(found.data)),
            "models": names,
            "seconds": found.seconds,
            "finish_reason": found.finish_reason,
        },
        f"{len(found.data)} bytes in {sum(r.passes for r in readers)} passes, {found.seconds:.2f} s "
        f"({' and '.join(names)}, {found.finish_reason})",
        lambda: found.trace(names),
        "surest" if len(names) > 1 else "entropy",
        {"method": "byte-level"},
    )
