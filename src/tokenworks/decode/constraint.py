"""Constraints: which texts may be written, asked one token at a time.

    dates = regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", tokenizer)
    dates.allows(token)            # may the text begin with this token?
    dates.after(token).complete    # may it end there?

A `Constraint` is what may still follow, as a derivative of a language is: there is no other state. Regular
expressions, JSON Schema and grammars are judged by `llguidance`; `FunctionConstraint` takes any Python function.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenworks.core.byte_vocab import ByteVocab
from tokenworks.core.errors import InputError


class Constraint(Protocol):
    """A set of texts, seen from the end of what has been written of one."""

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        ...

    def allows(self, token: int) -> bool:
        """Whether the text may go on with `token`. True for a token that leads nowhere only costs dead ends; False
        for one that an allowed text goes on with is a mistake."""
        ...

    def after(self, token: int) -> Constraint:
        """What may follow an allowed token. This constraint stays as it is."""
        ...


@runtime_checkable
class Maskable(Protocol):
    """A Constraint that can judge the whole vocabulary at once."""

    def mask(self) -> Tensor:
        """bool [V]: `allows` of every token."""
        ...


class EngineConstraint:
    """A constraint that `llguidance` judges; made by `regex`, `json_schema` and `grammar`."""

    def __init__(self, matcher: LLMatcher, name: str) -> None:
        self._matcher, self._name = matcher, name
        self._check()

    @property
    def complete(self) -> bool:
        return bool(self._matcher.is_accepting())

    def allows(self, token: int) -> bool:
        return self._matcher.validate_tokens([token]) == 1

    def after(self, token: int) -> EngineConstraint:
        following = self._matcher.deep_copy()
        following.consume_token(token)
        return EngineConstraint(following, self._name)

    def mask(self) -> Tensor:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(bits, bitorder="little").astype(bool)
        return torch.from_numpy(allowed)

    def _check(self) -> None:
        if self._matcher.is_error():
            # Without our own last line, and without the rule that a schema was wrapped in.
            lines = [line for line in self._matcher.get_error().splitlines() if "%llguidance" not in line]
            if lines[0].startswith("NoExtension"):
                raise InputError(f"{self._name}: no text satisfies it")
            said = re.sub(
                r"^at .*failed to compile JSON schema: (.*?)\n.*", r"\1", "\n".join(lines), flags=re.DOTALL
            )
            raise InputError(f"{self._name}: {said.strip() or 'not understood'}")


def regex(pattern: str, tokenizer: PreTrainedTokenizerBase) -> EngineConstraint:
    r"""Texts that match `pattern` from end to end.

    Args:
        pattern: in the syntax of Rust's `regex`: no look-around, no back-references. It is matched without
            backtracking, so no pattern takes more than linear time.

    Raises:
        InputError: the pattern is empty, has a syntax error, or is too large.
    """
    if not pattern:
        raise InputError("regex: empty; write what the text should look like, such as [0-9]{4}-[0-9]{2}")
    quoted: str = json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"][0]["lark_grammar"]
    return _engine(quoted, tokenizer, "regex")


def json_schema(schema: dict[str, Any] | str, tokenizer: PreTrainedTokenizerBase) -> EngineConstraint:
    """JSON texts that a JSON Schema accepts, without white space that means nothing.

    Raises:
        InputError: not JSON, a keyword that `llguidance` does not know, or a schema that no value fulfils.
    """
    try:
        read = json.loads(schema) if isinstance(schema, str) else schema
    except ValueError as error:
        raise InputError(f"json-schema: not JSON ({error})") from error
    if not isinstance(read, dict):
        raise InputError(f'json-schema: expected an object such as {{"type": "object"}}, got {str(read)[:60]!r}')
    # Free white space would let a small model write nothing else.
    said = json.dumps({"x-guidance": {"whitespace_flexible": False}, **read})
    return _engine(f"start: %json {said}", tokenizer, "json-schema")


def grammar(lark: str, tokenizer: PreTrainedTokenizerBase) -> EngineConstraint:
    """Texts of a context-free grammar in Lark's notation, from its rule `start`.

    Raises:
        InputError: a syntax error (the message points at it), or a grammar that is too large.
    """
    if not lark.strip():
        raise InputError('grammar: empty; write rules in Lark\'s notation, such as start: "yes" | "no"')
    return _engine(lark, tokenizer, "grammar")


def _engine(lark: str, tokenizer: PreTrainedTokenizerBase, name: str) -> EngineConstraint:
    # Where only one text can follow, the engine would else allow none but the tokens that its tokenizer makes of
    # it, and its mask would not be that of the constraint. At the end, so that messages count the user's lines.
    said = f'{lark}\n%llguidance {{"no_forcing": true}}\n'
    matcher = LLMatcher(_engine_tokenizer(tokenizer), LLMatcher.grammar_from_lark(said), log_level=0)
    found = EngineConstraint(matcher, name)
    if not found.complete and not found.mask().any():
        raise InputError(f"{name}: no text satisfies it")
    return found


@lru_cache(maxsize=4)
def _engine_tokenizer(tokenizer: PreTrainedTokenizerBase) -> LLTokenizer:
    # An end of text must exist for the engine; that it is allowed is asked through `complete`.
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    return from_tokenizer(tokenizer, eos_token=end)  # type: ignore[arg-type]  # ByteVocab refused slow ones


class FunctionConstraint:
    """A constraint that Python functions judge.

    Args:
        prefix: of bytes written so far, whether an allowed text begins with them. They may end inside a character.
        complete: whether the bytes are an allowed text.
        vocabulary: of the model's tokenizer.
        written: what has been written already.
        name: for messages.

    Raises:
        InputError: a function raised, or returned something else than True or False; or `prefix` refuses the
            beginning already, so that no text can satisfy it.
    """

    def __init__(
        self,
        prefix: Callable[[bytes], bool],
        complete: Callable[[bytes], bool],
        vocabulary: ByteVocab,
        written: bytes = b"",
        name: str = "constraint",
    ) -> None:
        self._prefix, self._complete, self._vocabulary = prefix, complete, vocabulary
        self.written, self._name = written, name
        if not written and not self._ask(prefix, b""):
            raise InputError(f"{name}: refuses even the beginning of a text, so no text satisfies it")

    @property
    def complete(self) -> bool:
        return self._ask(self._complete, self.written)

    def allows(self, token: int) -> bool:
        piece = self._vocabulary.pieces[token]
        return piece is not None and self._ask(self._prefix, self.written + piece)

    def after(self, token: int) -> FunctionConstraint:
        written = self.written + (self._vocabulary.pieces[token] or b"")
        return FunctionConstraint(self._prefix, self._complete, self._vocabulary, written, self._name)

    def _ask(self, function: Callable[[bytes], bool], text: bytes) -> bool:
        try:
            answer = function(text)
        except Exception as error:
            raise InputError(f"{self._name}: it raised {error!r} on {text[-60:]!r}") from error
        if not isinstance(answer, bool | np.bool_):
            raise InputError(f"{self._name}: it returned {answer!r} on {text[-60:]!r}, not True or False")
        return bool(answer)
