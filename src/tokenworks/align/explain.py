"""What a method would do to a pair, token by token, without training on it.

    for trace in explain(policy, reference, tokenizer, prompt, chosen, rejected, TDPO()):
        print(trace.to_terminal("push"))

Beside the method's own channels there is `push`: how much the loss of this pair would fall if the token's
log-probability rose by one nat. Positive tokens would be made likelier, negative ones less likely, those at 0 are
left alone. Between two models this also reads a policy that is trained: what it has learned to like, and where.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenworks.align.contract import Outcome, PreferenceMethod
from tokenworks.align.reading import Batch, EncodedPair, collate, encode_pair, read_pairs
from tokenworks.align.scores import Scorer
from tokenworks.core.errors import InputError
from tokenworks.core.trace import Trace

SIDES = ("chosen", "rejected")


def explain(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    chosen: str,
    rejected: str,
    method: PreferenceMethod,
    scorer: Scorer | None = None,
) -> tuple[Trace, Trace]:
    """A Trace of the chosen and one of the rejected response.

    Args:
        scorer: for a method that needs scores.

    Raises:
        InputError: an empty or equal response, scores that are needed and missing, or models that do not fit.
    """
    if not prompt or not chosen or not rejected:
        raise InputError("prompt, chosen, rejected: empty; all three need some text")
    if chosen == rejected:
        raise InputError("rejected: the same as the chosen response; there is nothing to explain")
    pair = encode_pair(tokenizer, prompt, chosen, rejected)
    if method.needs.scores:
        if scorer is None:
            raise InputError(f"scorer: the method needs {method.needs.scores}")
        pair = replace(
            pair,
            chosen_scores=scorer(pair.prompt, pair.chosen),
            rejected_scores=scorer(pair.prompt, pair.rejected),
        )
    batch = collate([pair])
    outcome, push = _outcome_and_push(policy, reference, batch, method)
    return _trace(tokenizer, pair, batch, outcome, push, 0), _trace(tokenizer, pair, batch, outcome, push, 1)


def _outcome_and_push(
    policy: PreTrainedModel, reference: PreTrainedModel, batch: Batch, method: PreferenceMethod
) -> tuple[Outcome, Tensor]:
    with torch.no_grad():
        pairs = read_pairs(policy, reference, batch, method.needs)
    training = isinstance(method, nn.Module) and method.training
    if isinstance(method, nn.Module):
        method.eval()
    log_p = pairs.log_p.detach().requires_grad_(True)
    with torch.enable_grad():
        outcome = method(replace(pairs, log_p=log_p))
        (gradient,) = torch.autograd.grad(outcome.loss.sum(), log_p)
    if isinstance(method, nn.Module):
        method.train(training)
    return outcome, -gradient


def _trace(
    tokenizer: PreTrainedTokenizerBase, pair: EncodedPair, batch: Batch, outcome: Outcome, push: Tensor, side: int
) -> Trace:
    ids = (pair.chosen, pair.rejected)[side]
    inside = batch.mask[side]
    trace = Trace.from_ids(ids, tokenizer)
    widest = float(push.abs().max()) or 1.0
    said = "by how much the pair's loss falls if the token's log-probability rises by one nat"
    trace.add("push", push[side][inside].tolist(), said, -widest, widest)
    for name, values in outcome.channels.items():
        trace.add(name, values[side][inside].tolist(), outcome.descriptions.get(name, ""))
    trace.meta |= {
        "title": f"{SIDES[side]}: {tokenizer.decode(pair.prompt)}"[:90],
        "side": SIDES[side],
        "loss": float(outcome.loss.detach().sum()),
        "reward": float(outcome.rewards[side]),
    }
    return trace
