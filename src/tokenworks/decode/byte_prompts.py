"""Prompts of byte models: what stands before a text, and what may be one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tokenworks.core.errors import InputError


def checked_text(text: bytes | str, before: bytes = b"", name: str = "prompt") -> bytes:
    """UTF-8 bytes, which may end inside a character.

    Args:
        before: the beginning of a character that the text goes on with.
        name: of the argument, for the error.

    Raises:
        InputError: no text in UTF-8 begins with them.
    """
    data = text.encode() if isinstance(text, str) else bytes(text)
    whole = before + data
    try:
        whole.decode()
    except UnicodeDecodeError as error:
        if error.end < len(whole) or error.reason != "unexpected end of data":
            raise InputError(
                f"{name}: not UTF-8; byte {whole[error.start]:#04x} at {max(0, error.start - len(before))} "
                f"({error.reason}). Convert the text to UTF-8 first"
            ) from error
    return data


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that stand at the beginning of a text: what the tokenizer puts there, else the token that separates
    texts, else the one that begins them; empty if there is none."""
    own = list(tokenizer("")["input_ids"])
    if own:
        return own
    known = tokenizer.get_vocab()
    candidates = [known.get("<|endoftext|>"), tokenizer.bos_token_id, tokenizer.eos_token_id]
    return [token for token in candidates if token is not None][:1]


def infilling_ids(tokenizer: PreTrainedTokenizerBase, after: str, control: tuple[str, str, str]) -> list[int]:
    """What to put before a text that is to be continued until `after` follows: `prefix_ids` for `start`.

    The order is that of CodeLlama's suffix-prefix-middle format, <PRE> <SUF> after <MID> before: the text before
    the gap comes last and may end inside a token.

    Args:
        control: the model's tokens that announce prefix, suffix and middle.

    Raises:
        InputError: the tokenizer does not know these tokens; the model was not trained to fill in.
    """
    known = tokenizer.get_vocab()
    missing = [name for name in control if name not in known]
    if missing:
        raise InputError(f"control: the tokenizer has no {', '.join(missing)}; was the model trained to fill in?")
    before, suffix, middle = (known[name] for name in control)
    text = tokenizer(after, add_special_tokens=False)["input_ids"]
    return [*beginning(tokenizer), before, suffix, *text, middle]


def chat_prefixes(tokenizers: Sequence[PreTrainedTokenizerBase], message: str) -> list[list[int]]:
    """`prefix_ids` for an answer to one user message: each model's own chat template with the message in it.

    Raises:
        InputError: no models, an empty message, or models that have no chat template: a prompt cannot be a
            question to one and a text to be continued to another.
    """
    if not tokenizers:
        raise InputError("tokenizers: empty; give that of each model")
    if not message.strip():
        raise InputError("message: empty; write something for the models to answer")
    without = [str(number) for number, each in enumerate(tokenizers) if each.chat_template is None]
    if without:
        raise InputError(
            f"message: of these {len(tokenizers)} models number {', '.join(without)} (from 0) has no chat "
            "template, so it cannot answer a message; give the prompt as a text to be continued instead"
        )
    found: list[list[int]] = []
    for each in tokenizers:
        chat: Any = each.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, return_dict=True
        )
        found.append(list(chat["input_ids"]))
    return found
