"""Training of prompt tokens (arXiv 2405.18628), on greedy text that the target wrote itself.

The paper rolls the frozen target out for m tokens from a random place of a text, and teaches the prompts put
there to say what the target said. On the target's own greedy text the roll-out is the text itself, so the
teacher's logits are those of the states kept with it, and one row serves many places at once: a group of
prompts hangs at each, sees the real tokens up to there and its own group, and is seen by nothing real. The real
tokens' keys and values need no gradient. The embeddings of the prompts are all that is trained.

A prompt may be an ensemble of n embeddings that share a position and whose logits are averaged; decoding, as in
the official repository, takes n = 1.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from tokenworks.core.architectures import cache_argument, sliding_window
from tokenworks.core.cost import kept_cost
from tokenworks.core.errors import InputError
from tokenworks.core.files import atomic_write
from tokenworks.core.sampling import top_ids
from tokenworks.core.selftext import TEMPERATURES, SelfText, write_text
from tokenworks.core.session import Session
from tokenworks.core.training import Progress, fit, quiet
from tokenworks.decode.ppd import PromptTokens, choose_budget

DECAY = 0.8
"""How much less each prompt's loss counts than the one before."""

TOP = 10
"""Guesses of a prompt whose accuracy is measured; a tree uses no more."""

ROWS, GROUPS = 1, 64
"""A training step sees so many rows, and so many places in each."""

SURE = 0.99
"""A turn in which the target chose its likeliest token so often was written greedily; float16 states hide ties."""

CONFIG = "prompts.json"
"""The file that tells a folder of prompt tokens from other models'."""

Guess = Callable[[Tensor, Tensor], Tensor]
"""Takes row numbers [B] and places [B, G]; gives logits [B, G, m, V] of the tokens 2 to m + 1 ahead."""


class GreedyText:
    """Rows of greedy text, and the places in them from which the next m tokens are the target's own choice.

    Args:
        texts: as `write_text` gives them.
        target: the model that wrote them.
        prompts: m.

    Attributes:
        tokens: int64 [R, T].
        places: for each row the positions t such that t + 1 to t + m were chosen greedily; at least one.
    """

    def __init__(self, texts: Sequence[SelfText], target: PreTrainedModel, prompts: int) -> None:
        self._head, self.prompts = target.get_output_embeddings(), prompts
        tokens, states = [], []
        self.places: list[Tensor] = []
        for text in texts:
            for row in range(0, len(text.tokens), len(TEMPERATURES)):  # answers of these rows have temperature 0
                places = self._greedy_places(text.tokens[row], text.states[row], text.free[row])
                if len(places):
                    tokens.append(text.tokens[row])
                    states.append(text.states[row])
                    self.places.append(places)
        if not tokens:
            raise InputError("texts: no greedy answer in them; write more, or longer rows")
        self.tokens, self._states = torch.stack(tokens), torch.stack(states)

    @torch.inference_mode()
    def _greedy_places(self, tokens: Tensor, states: Tensor, free: Tensor) -> Tensor:
        greedy = torch.zeros_like(free)
        greedy[1:] = self._head(states[:-1].float()).argmax(-1) == tokens[1:]
        inside = torch.zeros_like(free)
        for turn in _runs(free):
            # A request is drawn at temperature 1; where it happens to be greedy it is no sample of greedy text.
            inside[turn] = greedy[turn] & (greedy[turn].float().mean() >= SURE)
        return inside[1:].unfold(0, self.prompts, 1).all(-1).nonzero().flatten()

    def teacher(self, rows: Tensor, places: Tensor) -> Tensor:
        """The target's logits [B, G, m, V] of the tokens 2 to m + 1 after each place [B, G]."""
        ahead = places[..., None] + torch.arange(1, self.prompts + 1)
        logits: Tensor = self._head(self._states[rows[:, None, None], ahead].float())
        return logits


def _runs(flags: Tensor) -> Iterator[slice]:
    """The stretches of a bool [T] that are true."""
    edges = torch.diff(flags.int(), prepend=torch.zeros(1), append=torch.zeros(1)).nonzero().flatten().tolist()
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        yield slice(begin, end)


def frozen(target: PreTrainedModel) -> PreTrainedModel:
    """The same weights behind parameters that take no gradient; the target itself is not changed."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in target.parameters()}
    return copy.deepcopy(target, memo=shared).eval()


def initial_embeddings(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> Tensor:
    """What training begins with: the embeddings [count, d] of "Next 2 word Next 3 word ...", cut to `count`."""
    text = " ".join(f"Next {number} word" for number in range(2, count + 2))
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:count])
    rows: Tensor = target.get_input_embeddings()(ids)
    return rows.detach().clone()


def prompt_logits(
    target: PreTrainedModel, embeddings: Tensor, prompts: int, tokens: Tensor, places: Tensor
) -> Tensor:
    """The logits of a group of prompts at each place of each row; gradients reach the embeddings alone.

    Prompt S_i of a group at place t stands at position t + i and sees the real tokens up to t and S_1 to S_i. Of
    an ensemble, embedding j sees embeddings j only, and the logits of the n embeddings are averaged.

    Args:
        target: `frozen`.
        embeddings: [m * n, d], those of S_1 first; put in as they are, also where a model scales its own.
        prompts: m.
        tokens: int64 [B, T].
        places: int64 [B, G], positions in [0, T).

    Returns:
        [B, G, m, V].
    """
    batch, groups = places.shape
    ensemble = len(embeddings) // prompts
    slot = torch.arange(len(embeddings))
    step, member = slot // ensemble, slot % ensemble
    own = (step[:, None] >= step) & (member[:, None] == member)
    real = torch.arange(tokens.shape[1]) <= places[..., None]
    real = real.repeat_interleave(len(slot), dim=1)
    others = torch.block_diag(*[own] * groups).bool().expand(batch, -1, -1)
    seen = torch.cat([real, others], dim=2)
    decoder, dtype = target.get_decoder(), embeddings.dtype
    bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    cache = {cache_argument(decoder): DynamicCache()}
    with torch.no_grad():
        decoder(input_ids=tokens, use_cache=True, **cache)
    states = decoder(
        inputs_embeds=embeddings.repeat(groups, 1).expand(batch, -1, -1),
        position_ids=(places[..., None] + 1 + step).flatten(1),
        attention_mask=bias[:, None],
        use_cache=True,
        **cache,
    ).last_hidden_state
    logits: Tensor = target.get_output_embeddings()(states)
    return logits.view(batch, groups, prompts, ensemble, -1).mean(3)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """(1/m) sum_i DECAY^(i-1) KL(teacher_i || student_i), mean over all groups; logits [..., m, V] each."""
    kl = kl_div(log_softmax(student, -1), log_softmax(teacher, -1), reduction="none", log_target=True).sum(-1)
    prompts = kl.shape[-1]
    return (kl * DECAY ** torch.arange(prompts)).sum(-1).mean() / prompts


def train_embeddings(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: GreedyText,
    steps: int,
    learning_rate: float = 1e-2,
    ensemble: int = 1,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Progress = quiet,
) -> Tensor:
    """The embeddings [m * n, d] after so many steps; `seed` chooses rows and places."""
    model = frozen(target)
    start = initial_embeddings(target, tokenizer, text.prompts * ensemble)
    trained = nn.ParameterList([nn.Parameter(start)])

    def loss_at(step: int) -> Tensor:
        rows, places = some_places(text, seed, step)
        with torch.no_grad():
            teacher = text.teacher(rows, places)
        return divergence(prompt_logits(model, trained[0], text.prompts, text.tokens[rows], places), teacher)

    fit(trained, loss_at, steps, learning_rate, checkpoint, warmup=0.0, progress=progress)
    return trained[0].detach()


def some_places(text: GreedyText, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Rows [ROWS] and places [ROWS, GROUPS] for a training step, drawn with replacement."""
    random = torch.Generator().manual_seed(1_000_003 * seed + step)
    rows = torch.randint(len(text.tokens), (ROWS,), generator=random)
    places = [text.places[row] for row in rows.tolist()]
    return rows, torch.stack([p[torch.randint(len(p), (GROUPS,), generator=random)] for p in places])


@torch.inference_mode()
def measure_accuracy(guess: Guess, text: GreedyText) -> Tensor:
    """For each row the share of its places where the true token i + 1 ahead is rank j of guess i: [R, m, TOP]."""
    shares = []
    for row, places in enumerate(text.places):
        here = torch.tensor([row])
        truth = text.teacher(here, places[None])[0].argmax(-1)
        ranked = top_ids(guess(here, places[None]).flatten(0, 2), TOP).view(*truth.shape, TOP)
        shares.append((ranked == truth[..., None]).float().mean(0))
    return torch.stack(shares)


def train_prompt_tokens(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    prompts: int = 3,
    ensemble: int = 1,
    batches: int = 18,
    steps: int = 700,
    learning_rate: float = 1e-2,
    seed: int = 0,
    progress: Progress = quiet,
) -> dict[str, float]:
    """Train prompt tokens for `target` and write them to the folder `out`. A run that was cut off goes on.

    Args:
        target: a decoder-only model in float32, whose text fits its sliding window, if it has one.
        prompts: m, how many tokens beyond the next are guessed.
        ensemble: n, embeddings to a prompt; decoding takes 1.
        batches: of self-written text (`write_text`), of 48 rows of 384 tokens each; the last is held out.
        steps: of training, `ROWS` x `GROUPS` places each.
        seed: of the places.

    Returns:
        On the held-out rows, "top-1 of S_i" and "top-10 of S_i": how often the token i + 1 ahead was among so many
        guesses of prompt i.

    Raises:
        InputError: fewer than two batches, no prompts, an empty ensemble, or a sliding window shorter than a row.
    """
    if batches < 2:
        raise InputError(f"batches: {batches} is not at least 2; the last is held out")
    for name, number in (("prompts", prompts), ("ensemble", ensemble)):
        if number < 1:
            raise InputError(f"{name}: {number} is not at least 1")
    unfinished = out / "unfinished"
    texts = []
    for number in range(batches):
        path = unfinished / f"text-{number:03d}.safetensors"
        if not path.exists():
            write_text(target, tokenizer, seed=number).save(path)
        texts.append(SelfText.load(path))
        progress(number + 1, batches, "writing text")
    window, length = sliding_window(target.config.get_text_config(decoder=True)), texts[0].tokens.shape[1]
    if window is not None and window < length:
        raise InputError(f"target: its sliding window of {window} is shorter than a row of {length} tokens")
    text = GreedyText(texts[:-1], target, prompts)
    embeddings = train_embeddings(
        target, tokenizer, text, steps, learning_rate, ensemble, seed, unfinished / "training.pt", progress
    )
    held_out = GreedyText(texts[-1:], target, prompts)
    accuracy = measure_accuracy(prompt_guess(target, embeddings, held_out), held_out).mean(0)
    save_prompt_tokens(TrainedPrompts(embeddings, accuracy), out)
    for path in unfinished.iterdir():
        path.unlink()
    unfinished.rmdir()
    return {
        f"top-{top} of S_{number}": float(row[:top].sum())
        for number, row in enumerate(accuracy, start=1)
        for top in (1, TOP)
    }


def prompt_guess(target: PreTrainedModel, embeddings: Tensor, text: GreedyText) -> Guess:
    """What `measure_accuracy` asks prompt tokens."""
    return lambda rows, places: prompt_logits(target, embeddings, text.prompts, text.tokens[rows], places)


@dataclass(frozen=True)
class TrainedPrompts:
    """Prompt tokens, and how often they are right.

    Attributes:
        embeddings: float32 [m * n, d].
        accuracy: [m, TOP], A[i][j] the probability that the token i + 2 ahead is rank j of prompt i (from 0).
    """

    embeddings: Tensor
    accuracy: Tensor

    def drafter(self, session: Session, budget: int | None = None) -> PromptTokens:
        """The drafter for a session, to which the prompts are added.

        Args:
            budget: slots of a pass, at least 1; by default what decodes fastest on this machine.

        Raises:
            InputError: the embeddings are of an ensemble, or not of the model's width.
        """
        if len(self.embeddings) != len(self.accuracy):
            raise InputError(
                f"embeddings: {len(self.embeddings)} for {len(self.accuracy)} prompts; to decode, train with "
                "ensemble=1"
            )
        if budget is None:
            budget = choose_budget(self.accuracy, kept_cost(session))
        return PromptTokens(session.add_inputs(self.embeddings), self.accuracy, budget)


def save_prompt_tokens(trained: TrainedPrompts, out: Path) -> None:
    """Write `model.safetensors` and `CONFIG`."""
    with atomic_write(out / "model.safetensors", "wb") as file:
        file.write(save({"embeddings": trained.embeddings.contiguous()}))
    with atomic_write(out / CONFIG) as text:
        json.dump({"accuracy": [[round(float(a), 5) for a in row] for row in trained.accuracy]}, text, indent=1)


def load_prompt_tokens(target: PreTrainedModel, folder: Path | None = None) -> TrainedPrompts:
    """What `train_prompt_tokens` wrote; by default the prompts for SmolLM2-135M that come with tokenworks.

    Raises:
        InputError: the folder holds no prompt tokens, or those of another target.
    """
    shipped = Path(str(files("tokenworks.decode").joinpath("weights", "prompt-tokens-smollm2-135m")))
    place = shipped if folder is None else folder
    try:
        embeddings = load_file(place / "model.safetensors")["embeddings"].float()
        accuracy = torch.tensor(json.loads((place / CONFIG).read_text())["accuracy"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(
            f"folder: {place} holds no prompt tokens that `tokenworks train prompt-tokens` wrote ({error})"
        ) from error
    width = target.get_input_embeddings().get_parameter("weight").shape[1]
    if accuracy.dim() != 2 or embeddings.dim() != 2 or len(embeddings) % len(accuracy):
        raise InputError(f"folder: {place.name} says {list(accuracy.shape)} prompts, but holds {len(embeddings)}")
    if embeddings.shape[1] != width:
        raise InputError(
            f"folder: {place.name} holds embeddings of width {embeddings.shape[1]}, but the target's is {width}; "
            "train prompt tokens for it with `tokenworks train prompt-tokens`"
        )
    return TrainedPrompts(embeddings, accuracy)
