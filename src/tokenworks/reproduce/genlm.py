"""The peer `genlm-control`, AWRS by its authors, behind one function. It comes with the extra `peers`."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import warnings
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Judge(Protocol):
    """A checker of bytes."""

    def prefix(self, text: bytes) -> bool: ...

    def complete(self, text: bytes) -> bool: ...


def installed() -> bool:
    return importlib.util.find_spec("genlm") is not None and importlib.util.find_spec("genlm.control") is not None


class GenLM:
    """Their sampler and their SMC on our model, with the prompt's keys and values kept, as they advise."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        from genlm.backend.llm import AsyncTransformer

        warnings.filterwarnings("ignore", module="genlm")
        warnings.filterwarnings("ignore", message=".*past_key_values.*")
        self._llm = AsyncTransformer(model, tokenizer)

    def sample(self, ids: list[int], judge: Judge, limit: int, seed: int) -> tuple[dict[str, float], int]:
        """The posterior over texts of five particles, and how often the checker was asked."""
        from genlm.control import AWRS, Potential, PromptedLLM

        class Asked(Potential):
            """The same checker as a Potential of theirs."""

            def __init__(self, vocabulary: list[Any]) -> None:
                super().__init__(vocabulary)
                self.count = 0

            async def prefix(self, context: list[Any]) -> float:
                self.count += 1
                return 0.0 if judge.prefix(_spell(context)) else -math.inf

            async def complete(self, context: list[Any]) -> float:
                self.count += 1
                return 0.0 if judge.complete(_spell(context)) else -math.inf

        self._llm.clear_cache()
        self._llm.cache_kv(ids)
        np.random.seed(seed)  # noqa: NPY002  # theirs draws from it
        prompted = PromptedLLM(self._llm, prompt_ids=ids)
        asked = Asked(prompted.vocab)

        async def work() -> Any:
            return await AWRS(prompted, asked, seed=seed).smc(n_particles=5, ess_threshold=0.5, max_tokens=limit)

        found = asyncio.run(work())
        return {str(text): float(p) for text, p in found.decoded_posterior.items()}, asked.count


def _spell(context: list[Any]) -> bytes:
    return b"".join(bytes(getattr(token, "byte_string", token)) for token in context)
