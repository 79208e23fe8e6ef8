"""Session: one model and its KV cache, extended by chains and token trees, committed and rolled back.

    session = Session(model)
    first = session.prefill(prompt_ids)                               # logits [V] after the prompt
    logits = session.extend(TokenTree.of([5, 7, 9], [ROOT, 0, 0]))   # [3, V], one forward pass
    session.commit([0, 2])                                            # keep 5 then 9, drop 7

A decoder asks for no more than the `Engine` protocol, so that another engine can stand behind it. Nothing here
knows of sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenworks.core.architectures import PROVED, cache_argument, prove_trees, refuse_unsupported, sliding_window
from tokenworks.core.errors import InputError, NumericalError
from tokenworks.core.packing import inference_view
from tokenworks.core.tree import ROOT, TokenTree, TreeShape

PREFILL_CHUNK = 512
"""Tokens a prompt is read in at a time: bounds the memory of the attention scores."""

FIRST_CAPACITY = 512
"""Cache slots allocated at first; doubled when they run out."""


Reader = Callable[[Tensor, Tensor], None]
"""Takes n token ids [n] and the logits after each of them [n, V]."""


class Engine(Protocol):
    """What a decoder needs of a model: `Session`, or another engine that stands in for it."""

    vocab_size: int
    input_size: int
    context_limit: int
    device: torch.device
    tokens: list[int]

    @property
    def length(self) -> int: ...

    def prefill(self, tokens: Sequence[int] | Tensor, reader: Reader | None = None) -> Tensor: ...

    def extend(self, tokens: Sequence[int] | Tensor | TokenTree) -> Tensor: ...

    def commit(self, path: Sequence[int] | None = None) -> None: ...

    def rollback(self, length: int | None = None) -> None: ...


class Session:
    """A sequence being decoded by one model. Several sessions may share a model; each has its own cache.

    Args:
        model: a decoder-only Hugging Face model; it is not changed.
        max_length: most tokens the session may hold, at most the model's context (the default).

    Attributes:
        vocab_size: V, the width of the logits.
        keep_hidden: set it to have `hidden` after every pass.
        hidden: float [N, d], what the head made the last pass's logits of, one row for each that was asked for.
        input_size: ids from 0 to here may be put in. More than V after `add_inputs`, or with a model whose head
            knows only a part of what it reads.

    Raises:
        UnsupportedModelError: the architecture cannot run token trees (recurrent state, encoder-decoder, ...).
        InputError: `max_length` is out of range.
    """

    def __init__(self, model: PreTrainedModel, max_length: int | None = None) -> None:
        refuse_unsupported(model)
        config = model.config.get_text_config(decoder=True)
        context = getattr(config, "max_position_embeddings", None) or 1 << 20
        if max_length is not None and not 1 <= max_length <= context:
            raise InputError(f"max_length: {max_length} is not between 1 and the model's context of {context}")
        self.model = model
        self.context_limit: int = max_length or context
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        own: Any = model.get_input_embeddings()
        self.input_size: int = own.weight.shape[0]
        self._added: Tensor | None = None
        self.window: int | None = sliding_window(config)
        self.tokens: list[int] = []
        """Committed token ids."""
        self.keep_hidden = False
        self.hidden: Tensor | None = None
        self._view = inference_view(model)
        self.device: torch.device = model.device
        self._dtype = model.dtype
        self._cache = SlotCache()
        self._cache_argument = cache_argument(self._view)
        self._forget_pending()
        if config.model_type not in PROVED:
            prove_trees(self)

    @property
    def length(self) -> int:
        """Number of committed tokens."""
        return len(self.tokens)

    @property
    def pending(self) -> int:
        """Number of slots extended but neither committed nor rolled back."""
        return len(self._pending_parents)

    def add_inputs(self, embeddings: Tensor) -> int:
        """Let more be put in than the model has ids for.

        Args:
            embeddings: float [m, d]; rows go into the first layer as they are.

        Returns:
            The id that stands for the first row; the others follow. They are never predicted.

        Raises:
            InputError: the rows are not of the model's width.
        """
        own: Any = self.model.get_input_embeddings()
        if embeddings.shape[1:] != own.weight.shape[1:]:
            raise InputError(
                f"embeddings: expected [m, {own.weight.shape[1]}], got {list(embeddings.shape)}; they must be of "
                "the width of the model's own"
            )
        first = self.input_size
        self._added = embeddings if self._added is None else torch.cat([self._added, embeddings])
        self.input_size += len(embeddings)
        return first

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int] | Tensor, reader: Reader | None = None) -> Tensor:
        """Commit `tokens`, read in chunks, and return only the logits after the last one: float32 [V].

        Args:
            tokens: at least one id.
            reader: if given, called for each chunk with its n ids and the logits after them [n, V].

        Raises:
            InputError: as `extend`; also if slots are pending. Nothing is committed then.
            NumericalError: the model returned NaN.
        """
        ids = self._checked_ids(tokens)
        if self.pending:
            raise InputError("prefill: commit or roll back the pending slots first")
        before = self.length
        self._check_room(len(ids))
        for start in range(0, len(ids), PREFILL_CHUNK):
            chunk = ids[start : start + PREFILL_CHUNK]
            logits = self._forward(TokenTree(chunk, TreeShape.chain(len(chunk))), keep_logits=reader is None)
            self.commit()
            if reader is not None:
                reader(chunk, logits[0].float())
        try:
            return self._checked_logits(logits[0, -1])
        except NumericalError:
            self.rollback(before)
            raise

    @torch.inference_mode()
    def extend(self, tokens: Sequence[int] | Tensor | TokenTree) -> Tensor:
        """Run the model over new slots in one forward pass; they stay pending until `commit` or `rollback`.

        Args:
            tokens: a chain of ids, which continues the last slot, or a `TokenTree`. Nodes are numbered from the
                first pending slot; a tree may hang under slots that are already pending if its shape's `first`
                says how many there are.

        Returns:
            float32 [N, V]: for each new slot the logits of the token after it.

        Raises:
            InputError: no tokens, an id outside the vocabulary, a tree that does not fit, or no room left.
            NumericalError: the model returned NaN.
        """
        if isinstance(tokens, TokenTree):
            self._checked_ids(tokens.tokens)
            if tokens.shape.first != self.pending:
                raise InputError(
                    f"tree: its nodes are numbered from {tokens.shape.first}, but {self.pending} slots are "
                    "pending; commit or roll back, or set the shape's `first`"
                )
            tree = tokens
        else:
            ids = self._checked_ids(tokens)
            tree = TokenTree(ids, TreeShape.chain(len(ids), self.pending))
        try:
            return self._checked_logits(self._forward(tree, keep_logits=0)[0])
        except NumericalError:
            self.rollback()
            raise

    def commit(self, path: Sequence[int] | None = None) -> None:
        """Keep the pending slots of one path, in order, and drop all other pending slots.

        Args:
            path: node numbers from a child of the context downwards; by default all pending slots, which must
                then form a chain. An empty path drops everything.

        Raises:
            InputError: the nodes do not form a path.
        """
        chosen = list(range(self.pending)) if path is None else list(path)
        above = ROOT
        for node in chosen:
            if not 0 <= node < self.pending or self._pending_parents[node] != above:
                raise InputError(f"path: {chosen} is not a path of the pending tree (at node {node})")
            above = node
        if chosen != list(range(len(chosen))):
            self._cache.move(self.length, chosen)
        self.tokens += [self._pending_tokens[node] for node in chosen]
        self._forget_pending()

    def rollback(self, length: int | None = None) -> None:
        """Drop all pending slots and, if `length` is given, all committed tokens after the first `length`.

        Raises:
            InputError: `length` is negative or more than is committed.
        """
        if length is not None:
            if not 0 <= length <= self.length:
                raise InputError(f"length: {length} is not between 0 and the {self.length} committed tokens")
            del self.tokens[length:]
        self._forget_pending()

    def cached(self) -> list[tuple[Tensor, Tensor]]:
        """For each layer the keys and values of the committed tokens, [1, kv_heads, length, d] each (views)."""
        return [(both[0][:, :, : self.length], both[1][:, :, : self.length]) for both in self._cache.layers]

    def _forget_pending(self) -> None:
        self._pending_tokens: list[int] = []
        self._pending_parents: list[int] = []
        self._pending_depths = torch.zeros(0, dtype=torch.long)
        self._pending_ancestors = torch.zeros(0, 0, dtype=torch.bool)

    def _checked_ids(self, tokens: Sequence[int] | Tensor) -> Tensor:
        ids = torch.as_tensor(tokens, device="cpu")
        if ids.dim() == 2 and len(ids) == 1:
            ids = ids[0]
        if ids.numel() == 0:
            raise InputError("tokens: empty; give at least one token id")
        if ids.dim() != 1 or ids.is_floating_point():
            raise InputError(f"tokens: expected one sequence of integer ids, got {ids.dtype} {list(ids.shape)}")
        if ids.min() < 0 or ids.max() >= self.input_size:
            bad = ids[(ids < 0) | (ids >= self.input_size)][0]
            raise InputError(
                f"tokens: id {int(bad)} is outside the model's vocabulary of {self.input_size}; "
                "do the tokens come from another model's tokenizer?"
            )
        return ids.long()

    def _checked_logits(self, logits: Tensor) -> Tensor:
        # A sum is NaN if any term is; only then is the slower exact test worth its time.
        logits = logits.float()
        if torch.isnan(logits.sum()) and torch.isnan(logits).any():
            raise NumericalError(
                "model: it returned NaN logits. Check its weights, or load it in float32 if it runs in float16."
            )
        return logits

    def _check_room(self, depth: int) -> None:
        if self.length + depth > self.context_limit:
            raise InputError(
                f"tokens: {self.length} committed and {depth} new do not fit the context of "
                f"{self.context_limit} tokens; shorten the prompt or generate less"
            )

    def _forward(self, tree: TokenTree, keep_logits: int) -> Tensor:
        """One pass over the tree's N nodes, which become pending; returns logits [1, N or keep_logits, V]."""
        before, first = self.length, self.pending
        depths, ancestors = self._grow(tree.shape)
        self._check_room(int(depths.max()) + 1)
        positions = before + depths
        self._cache.begin(before + first, len(tree))
        with self._watching_head():
            logits = self._run(tree, positions, ancestors, keep_logits)
        self._pending_tokens += tree.tokens.tolist()
        self._pending_parents += tree.shape.parents
        self._pending_depths, self._pending_ancestors = depths, ancestors
        return logits

    def _run(self, tree: TokenTree, positions: Tensor, ancestors: Tensor, keep_logits: int) -> Tensor:
        first = self.pending
        logits: Tensor = self._view(
            **self._inputs(tree.tokens.to(self.device)),
            position_ids=positions[first:].to(self.device)[None],
            attention_mask=self._bias(positions, ancestors[first:], first).to(self.device),
            use_cache=True,
            logits_to_keep=keep_logits,
            **{self._cache_argument: self._cache},
        ).logits
        return logits

    @contextmanager
    def _watching_head(self) -> Iterator[None]:
        """Keep what goes into the head. The view is shared by all Sessions of a model, so only for one pass."""
        if not self.keep_hidden:
            yield
            return

        def keep(_: object, inputs: tuple[Tensor, ...]) -> None:
            self.hidden = inputs[0][0]

        handle = self._view.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def _inputs(self, ids: Tensor) -> dict[str, Tensor]:
        if self._added is None:
            return {"input_ids": ids[None]}
        own = self.input_size - len(self._added)
        rows = self._view.get_input_embeddings()(ids.clamp(max=own - 1))
        beyond = ids >= own
        rows[beyond] = self._added[ids[beyond] - own].to(rows)
        return {"inputs_embeds": rows[None]}

    def _grow(self, shape: TreeShape) -> tuple[Tensor, Tensor]:
        """Depths [n] and ancestors [n, n] of all pending nodes once `shape` has joined them."""
        first = shape.first
        if first == 0:
            return shape.depths, shape.ancestors
        depths = torch.cat([self._pending_depths, torch.zeros(len(shape), dtype=torch.long)])
        ancestors = torch.eye(first + len(shape), dtype=torch.bool)
        ancestors[:first, :first] = self._pending_ancestors
        for node, parent in enumerate(shape.parents, start=first):
            if parent != ROOT:
                depths[node] = depths[parent] + 1
                ancestors[node] |= ancestors[parent]
        return depths, ancestors

    def _bias(self, positions: Tensor, ancestors: Tensor, first: int) -> Tensor:
        """What to add to the scores, [1, 1 or 2, N, length + n]: 0 where a node may look, the lowest float where
        it may not. The second channel, for layers with a sliding window, also hides what lies too far back."""
        width = len(ancestors)
        seen = torch.cat([torch.ones(width, self.length, dtype=torch.bool), ancestors], dim=1)
        channels = [seen]
        if self.window is not None:
            keys = torch.cat([torch.arange(self.length), positions])
            channels.append(seen & (positions[first:, None] - keys < self.window))
        lowest = torch.finfo(self._dtype).min
        bias = torch.zeros(1, len(channels), *seen.shape, dtype=self._dtype)
        return bias.masked_fill_(~torch.stack(channels), lowest)


class SlotCache:
    """Keys and values in preallocated slots, behind the two methods of `transformers.Cache` that models call."""

    def __init__(self) -> None:
        self.layers: list[Tensor] = []
        """For each layer [2, 1, kv_heads, capacity, d]: keys and values."""
        self._start = self._end = 0

    def begin(self, start: int, width: int) -> None:
        """Let the coming pass write slots `start` to `start + width`."""
        self._start, self._end = start, start + width

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values [1, kv_heads, width, d]; return all of the layer's so far."""
        if layer == len(self.layers):
            self.layers.append(key.new_empty(2, *key.shape[:2], max(FIRST_CAPACITY, self._end), key.shape[3]))
        slots = self.layers[layer]
        if self._end > slots.shape[3]:
            grown = slots.new_empty(*slots.shape[:3], max(2 * slots.shape[3], self._end), slots.shape[4])
            grown[:, :, :, : self._start] = slots[:, :, :, : self._start]
            slots = self.layers[layer] = grown
        slots[0, :, :, self._start : self._end] = key
        slots[1, :, :, self._start : self._end] = value
        return slots[0, :, :, : self._end], slots[1, :, :, : self._end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots filled before the pass under way."""
        return self._start

    @torch.inference_mode()
    def move(self, base: int, nodes: Sequence[int]) -> None:
        """Bring the slots `base + nodes` to `base`, in that order. Rotated keys keep their positions."""
        source = base + torch.tensor(nodes)
        for slots in self.layers:
            slots[:, :, :, base : base + len(nodes)] = slots[:, :, :, source.to(slots.device)]
