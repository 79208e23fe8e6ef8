"""PPD (arXiv 2405.18628): do trained prompt tokens see further ahead, and does a tree fitted to the machine pay?

The paper reports up to 2.49 times the speed of plain decoding for Vicuna on one A100, and up to 28% higher
acceptance of tokens far ahead than Medusa's heads. Measured here with the prompt tokens of SmolLM2-135M that
come with tokenworks:

    accuracy    how often the true token stands among the first ten guesses of each prompt, on greedy answers to
                the test prompts, against the untrained embeddings of the words that training began with, and
                against Medusa heads (arXiv 2401.10774) trained here on the same kind of text
    decoding    plain, with the tree of the size that this machine's cost curve chooses, and
                with the size of the paper's repository (105 slots)
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu
from transformers import PreTrainedModel

from tokenworks.core.cost import kept_cost
from tokenworks.core.data import Prompt, prompts
from tokenworks.core.measure import Interval, bootstrap, ratio_of_sums
from tokenworks.core.models import LoadedModel, load
from tokenworks.core.sampling import top_ids
from tokenworks.core.selftext import write_text
from tokenworks.core.session import Session
from tokenworks.core.text import encode_prompt
from tokenworks.core.training import fit
from tokenworks.decode.ppd import dynamic_trees
from tokenworks.decode.ppd_training import (
    TOP,
    TrainedPrompts,
    frozen,
    initial_embeddings,
    load_prompt_tokens,
    prompt_logits,
)
from tokenworks.decode.speculative import SpeculativeDecoder
from tokenworks.reproduce import Run
from tokenworks.reproduce.drafting import Comparison, compare
from tokenworks.reproduce.ledger import Ledger
from tokenworks.reproduce.result import Figure, Result, exact, figure, line

MODEL = "smollm2-135m"
LARGE = 105
PLAIN, FITTED, WIDE = "plain", "fitted", f"{LARGE} slots"
PLACES = 64
"""In self-written text, of a training step of the Medusa heads."""
GUESSERS = ("prompt tokens", "untrained", "Medusa")


class MedusaHeads(nn.Module):
    """m heads on the last state, x + SiLU(W x), then the model's own head; head i guesses token i + 1 ahead."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(heads))
        for block in self.blocks:
            nn.init.zeros_(block.weight)  # type: ignore[arg-type]
            nn.init.zeros_(block.bias)  # type: ignore[arg-type]

    def forward(self, states: Tensor) -> Tensor:
        """States [..., d] to states [..., m, d] that the model's head reads."""
        return torch.stack([states + silu(block(states)) for block in self.blocks], dim=-2)


def run(settings: Run) -> Result:
    """Measure, in about nine minutes a seed on two CPU cores; `quick` takes two."""
    begun = time.perf_counter()
    count, new_tokens, batches, steps = (4, 16, 1, 30) if settings.quick else (18, 96, 2, 150)
    loaded = load(MODEL)
    trained = load_prompt_tokens(loaded.model)
    session = Session(loaded.model)
    chosen = prompts(split="test", limit=count)
    cost = kept_cost(session)
    fitted = trained.drafter(session)
    facts = {
        "prompts": [p.id for p in chosen],
        "max_new_tokens": new_tokens,
        "medusa": {"batches": batches, "steps": steps},
        "slots": max(len(tree) for tree in fitted.trees.trees),
    }
    ledger = Ledger(settings.folder / "unfinished" / "ppd", {**facts, "torch": torch.__version__})
    decoders = {
        PLAIN: SpeculativeDecoder(Session(loaded.model)),
        FITTED: SpeculativeDecoder(session, fitted),
        WIDE: SpeculativeDecoder(session, trained.drafter(session, LARGE)),
    }
    found = compare(settings, loaded, decoders, chosen, new_tokens, ledger)
    settings.progress(0, 1, "training Medusa heads, for comparison")
    heads = _medusa(settings, loaded, len(trained.accuracy), batches, steps, ledger)
    hits: list[dict[str, Any]] = []
    for prompt in chosen:
        settings.progress(len(hits), count, f"guesses of {prompt.id}")
        answer = found.texts[PLAIN][prompt.id]
        hits.append(
            ledger.once(f"guesses/{prompt.id}", lambda: _guesses(loaded, trained, heads, prompt, answer))  # noqa: B023
        )
    used = [hit for hit in hits if hit["places"]]
    result = Result(
        slug="ppd",
        claim="",
        figures=_figures(found, used, trained),
        seeds=list(range(settings.seeds)),
        seconds=time.perf_counter() - begun,
        model=MODEL,
        settings={**facts, "sampling": "greedy", "batch": 1, "dtype": str(loaded.model.dtype)},
        table=[
            {**row, "same words": f"{found.same_text(str(row['decoder']), PLAIN):.0%}"}
            for row in found.rows(PLAIN)
        ],
        series=_series(used, trained, cost),
        notes=[
            "Medusa's heads have 1,000 times the parameters of the prompt tokens, but a few minutes of training "
            "here, less than the prompt tokens had: read that comparison as favouring the prompt tokens.",
        ],
    )
    ledger.close()
    return result


def _medusa(
    settings: Run, loaded: LoadedModel, count: int, batches: int, steps: int, ledger: Ledger
) -> MedusaHeads:
    """Heads trained to say the next tokens of text that the model wrote, from the states kept with it."""
    kept, head = ledger.folder / "medusa.pt", loaded.model.get_output_embeddings()
    heads = MedusaHeads(count, head.weight.shape[1])
    if kept.exists():
        heads.load_state_dict(torch.load(kept, weights_only=True))
        return heads
    texts = []
    for number in range(batches):
        settings.progress(number, batches, "writing text for the Medusa heads")
        texts.append(write_text(loaded.model, loaded.tokenizer, seed=1000 + number))
    tokens, states = torch.cat([t.tokens for t in texts]), torch.cat([t.states for t in texts])
    weight = head.weight.detach()

    def loss_at(step: int) -> Tensor:
        chance = torch.Generator().manual_seed(step)
        row = torch.randint(len(tokens), (PLACES,), generator=chance)
        place = torch.randint(tokens.shape[1] - count - 1, (PLACES,), generator=chance)
        wanted = torch.stack([tokens[row, place + ahead + 2] for ahead in range(count)], 1)
        logits = heads(states[row, place].float()) @ weight.T
        nats = cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(-1, count)
        return (nats * 0.8 ** torch.arange(count)).mean()

    fit(heads, loss_at, steps, 1e-3, ledger.folder / "medusa-training.pt", progress=settings.progress)
    torch.save(heads.state_dict(), kept)
    return heads


@torch.no_grad()
def _guesses(
    loaded: LoadedModel, trained: TrainedPrompts, heads: MedusaHeads, prompt: Prompt, answer: list[int]
) -> dict[str, Any]:
    """For each way of guessing how often the token 2, 3, ... ahead was among its first ten; sums over places."""
    model, count = frozen(loaded.model), len(trained.accuracy)
    ids = encode_prompt(loaded.tokenizer, prompt.text)
    tokens = torch.tensor([*ids, *answer])
    # From the last token of the prompt on, wherever all the tokens that are guessed are known.
    places = torch.arange(len(ids) - 1, max(len(ids) - 1, len(tokens) - count - 1))
    if not len(places):
        return {"places": 0}
    truth = torch.stack([tokens[places + ahead + 2] for ahead in range(count)], 1)
    states = model.get_decoder()(input_ids=tokens[None], use_cache=False).last_hidden_state[0, places]
    logits = {
        "prompt tokens": _prompted(model, trained.embeddings, count, tokens, places),
        "untrained": _prompted(
            model, initial_embeddings(loaded.model, loaded.tokenizer, count), count, tokens, places
        ),
        "Medusa": model.get_output_embeddings()(heads(states)),
    }
    found: dict[str, Any] = {"places": len(places)}
    for name, rows in logits.items():
        ranked = top_ids(rows.flatten(0, 1), TOP).view(*truth.shape, TOP)
        found[name] = (ranked == truth[..., None]).any(-1).sum(0).tolist()
    return found


def _prompted(model: PreTrainedModel, embeddings: Tensor, count: int, tokens: Tensor, places: Tensor) -> Tensor:
    return prompt_logits(model, embeddings, count, tokens[None], places[None])[0]


def _share(hits: list[dict[str, Any]], name: str, ahead: int) -> Interval:
    return ratio_of_sums([hit[name][ahead] for hit in hits], [hit["places"] for hit in hits])


def _ratio(hits: list[dict[str, Any]], name: str, baseline: str, ahead: int) -> Interval:
    def over(items: Any) -> float:
        ours, theirs = (sum(hits[item][each][ahead] for item in items) for each in (name, baseline))
        return ours / max(theirs, 1)

    return bootstrap(over, len(hits))


def _figures(found: Comparison, hits: list[dict[str, Any]], trained: TrainedPrompts) -> list[Figure]:
    last = len(trained.accuracy) - 1
    share = {name: _share(hits, name, last).value for name in GUESSERS}
    efficiency = {name: found.efficiency(name) for name in found.counts}
    speed = {name: found.tokens_per_second(name) for name in found.counts}
    same = min(found.same_text(name, PLAIN) for name in (FITTED, WIDE))
    ahead = f"tokens {last + 2} ahead"
    # Thresholds are the dossier's, fixed before anything was run.
    return [
        figure(f"Top-{TOP} acceptance of {ahead}, against untrained prompts", "ratio",
               _ratio(hits, "prompt tokens", "untrained", last), 1.1, 1.0, ours=share["prompt tokens"],
               baseline=share["untrained"], baseline_name="untrained prompts", headline=True),
        figure(f"Top-{TOP} acceptance of {ahead}, against Medusa heads", "ratio",
               _ratio(hits, "prompt tokens", "Medusa", last), 1.0, 0.9, ours=share["prompt tokens"],
               baseline=share["Medusa"], baseline_name="Medusa heads", paper="up to 1.28", headline=True),
        figure("Tokens a pass, the tree fitted to the machine", "tokens", efficiency[FITTED], 1.4, 1.1,
               ours=efficiency[FITTED].value, baseline=1.0, baseline_name="plain decoding", headline=True),
        figure("Speed of the tree fitted to the machine", "times", found.speed(FITTED, PLAIN), 1.1, 1.0,
               ours=speed[FITTED], baseline=speed[PLAIN], baseline_name="plain decoding",
               paper="up to 2.49 (A100)", headline=True),
        figure("Prompts with the words of plain decoding", "share", exact(same), 1.0, 1.0,
               ours=same, baseline=1.0, baseline_name="plain decoding", paper="all", headline=True),
        figure(f"Speed of the tree fitted to the machine, against {LARGE} slots", "times",
               found.speed(FITTED, WIDE), 1.0, 1.0, ours=speed[FITTED], baseline=speed[WIDE], baseline_name=WIDE),
        figure(f"Tokens a pass, {LARGE} slots", "tokens", efficiency[WIDE], 1.4, 1.1,
               ours=efficiency[WIDE].value, baseline=1.0, baseline_name="plain decoding"),
    ]  # fmt: skip


def _series(hits: list[dict[str, Any]], trained: TrainedPrompts, cost: Any) -> list[dict[str, Any]]:
    lines = []
    for name in GUESSERS:
        shares = [_share(hits, name, ahead) for ahead in range(len(trained.accuracy))]
        lines.append(line(name, [ahead + 2 for ahead in range(len(shares))], shares))
    budgets = [1, 2, 4, 6, 8, 12, 16, 24, 32, 48]
    trees = [dynamic_trees(trained.accuracy, budget) for budget in budgets]
    return [
        {
            "title": f"How often the true token is among the first {TOP} guesses",
            "x_label": "tokens ahead",
            "y_label": "share",
            "lines": lines,
        },
        {
            "title": "Which size of tree pays on this machine, as predicted",
            "x_label": "slots of a pass",
            "y_label": "against plain decoding",
            "lines": [
                {"name": "tokens a pass", "x": budgets, "y": [t.tokens_per_pass for t in trees]},
                {
                    "name": "speed",
                    "x": budgets,
                    "y": [t.tokens_per_pass * cost(1) / t.seconds_per_pass(cost) for t in trees],
                },
            ],
        },
    ]
