"""A router's training: it learns to tell the places where the small model would lead the text elsewhere from all
others, by what the small model felt there (`r2r_data`); its threshold is found on answers that it has not seen.
"""

from __future__ import annotations

import copy
import json
import warnings
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenworks.core.errors import InputError
from tokenworks.core.files import atomic_write
from tokenworks.core.measure import auc
from tokenworks.core.training import Progress, fit, quiet
from tokenworks.decode.draft_model import DraftModel
from tokenworks.decode.r2r import watched
from tokenworks.decode.r2r_data import RoutingData, build_routing_data, fingerprint
from tokenworks.decode.r2r_routers import TokenRouter

CONFIG = "router.json"

CHECKS = 20
"""How often a training run looks at the validation answers."""


def make_router(
    large: PreTrainedModel,
    small: DraftModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    rows: int = 72,
    steps: int = 200,
    progress: Progress = quiet,
) -> dict[str, float]:
    """Label `rows` rows of the large model's own answers, train a router for `small`, and write it to `out`. A run
    that was cut off goes on.

    Returns:
        What `train_router` found.

    Raises:
        InputError: as `build_routing_data` and `train_router`.
    """
    unfinished = out / "unfinished"
    data = build_routing_data(large, small, tokenizer, unfinished, rows, progress=progress)
    router, found = train_router(small, data, steps, progress=progress)
    save_router(router, small, out, found)
    for path in unfinished.iterdir():
        path.unlink()
    unfinished.rmdir()
    return found


def train_router(
    small: DraftModel,
    data: RoutingData,
    steps: int = 200,
    learning_rate: float = 3e-4,
    width: int = 256,
    depth: int = 2,
    seed: int = 0,
    progress: Progress = quiet,
) -> tuple[TokenRouter, dict[str, float]]:
    """Train a router on the places of whole rows: of every five, three to learn from.

    The fourth chooses the weights (those of the least loss on it, of `CHECKS` a run) and the threshold
    (`calibrate`); on the fifth it is measured.

    Args:
        steps: of 1024 tokens each, at least 1.
        width, depth: of the network, see `TokenRouter`.

    Returns:
        The router, and on the fifth rows: "auc", "recall", "false_positives" (by all tokens), "share" routed; and
        of all rows the shares "identical", "neutral" and "divergent".

    Raises:
        InputError: one of the three parts has no divergent places, or no others.
    """
    part = data.answer % 5
    train, valid, test = data[part < 3], data[part == 3], data[part == 4]
    for name, some in (("training", train), ("validation", valid), ("test", test)):
        if not 0 < int(some.divergent.sum()) < len(some):
            raise InputError(
                f"data: {int(some.divergent.sum())} of the {len(some)} {name} tokens are divergent; a router "
                "needs both kinds. Label more rows"
            )
    torch.manual_seed(seed)
    router = TokenRouter(_embeddings(small), data.hidden.shape[1], width, depth)
    weight = balance(train.divergent)
    best: tuple[float, dict[str, Tensor]] = (float("inf"), {})

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(train), (1024,), generator=torch.Generator().manual_seed(seed * 100_003 + step))
        router.train()
        return routing_loss(_logits(router, train[rows]), train.divergent[rows], weight)

    def watch(done: int, total: int, what: str) -> None:
        nonlocal best
        progress(done, total, what)
        if done % max(1, total // CHECKS) == 0 or done == total:
            router.eval()
            with torch.no_grad():
                found = float(routing_loss(_logits(router, valid), valid.divergent, weight))
            if found < best[0]:
                best = found, copy.deepcopy(router.state_dict())

    fit(router, loss, steps, learning_rate, weight_decay=5e-4, progress=watch)
    router.load_state_dict(best[1])
    router.eval()
    with torch.inference_mode():
        router.threshold = calibrate(torch.sigmoid(_logits(router, valid)), valid.divergent)
        scores = torch.sigmoid(_logits(router, test))
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


def _logits(router: TokenRouter, data: RoutingData) -> Tensor:
    found: Tensor = router(data.hidden.float(), data.top_logits.float(), data.index)
    return found


def balance(divergent: Tensor) -> Tensor:
    """What a divergent place weighs, so that all of them weigh as much as all others: n0 / n1, from bool [N]."""
    return (~divergent).sum() / divergent.sum()


def routing_loss(logits: Tensor, divergent: Tensor, weight: Tensor) -> Tensor:
    """Binary cross-entropy of logits [B], a divergent place counting `weight` times; the mean over B."""
    return binary_cross_entropy_with_logits(logits, divergent.float(), pos_weight=weight)


def calibrate(scores: Tensor, divergent: Tensor, min_recall: float = 0.95, max_false: float = 0.1) -> float:
    """The threshold with the fewest false alarms among those that find enough of the divergent places.

    Args:
        scores: float [N] in [0, 1]; divergent: bool [N]. A hundred thresholds from 0.01 to 0.99 are tried; of
            equally good ones the highest is taken.
        min_recall: share of divergent places to find. If no threshold does, the answer is 0.5, with a warning.
        max_false: false alarms by all tokens that are borne; if no threshold meets both, this one gives way.
    """
    rows = []
    for threshold in torch.linspace(0.01, 0.99, 100).tolist():
        routed = scores >= threshold
        recall = float(routed[divergent].float().mean())
        false = float((routed & ~divergent).float().mean())
        rows.append((false, -threshold, recall))
    enough = [row for row in rows if row[2] >= min_recall]
    if not enough:
        message = f"no threshold finds {min_recall:.0%} of the divergent places; 0.5 is taken"
        warnings.warn(message, stacklevel=2)
        return 0.5
    return -min([row for row in enough if row[0] <= max_false] or enough)[1]


def save_router(router: TokenRouter, small: DraftModel, out: Path, found: dict[str, float]) -> None:
    """Write the router's own weights in half precision, and which small model it is for."""
    kept = {name: p.detach().half().contiguous() for name, p in router.named_parameters()}
    with atomic_write(out / "model.safetensors", "wb") as file:
        file.write(save(kept))
    facts = {
        "width": router.width,
        "depth": len(router.blocks),
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
        width, depth, threshold, made_for = (facts[key] for key in ("width", "depth", "threshold", "small"))
        if made_for != fingerprint(small):
            raise InputError(
                f"router: {place.name} was trained for another small model; train one with "
                "`tokenworks train router`"
            )
        table = _embeddings(small)
        hidden = kept["enter.0.weight"].shape[1] - 2 * table.shape[1]
        router = TokenRouter(table, hidden, width, depth, threshold)
        router.load_state_dict({name: weight.float() for name, weight in kept.items()})
    except InputError:
        raise
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"router: {place} holds no router that `tokenworks train router` wrote ({error})"
        ) from error
    return router.eval()


def _embeddings(small: DraftModel) -> Tensor:
    table = watched(small).model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    return table[small.vocabulary]
