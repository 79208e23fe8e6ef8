"""CostCurve: what a forward pass costs on this machine against the number of slots it runs."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass

import numpy as np

from tokenworks.core.errors import InputError
from tokenworks.core.files import atomic_write, cache_folder
from tokenworks.core.measure import machine_facts
from tokenworks.core.session import Session
from tokenworks.core.tree import ROOT, TokenTree

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 81)
"""Widths measured by default: dense where a small machine's optimum lies, up to the largest published tree."""


@dataclass(frozen=True)
class CostCurve:
    """Seconds of one pass at measured widths, interpolated linearly between them and beyond the last.

    Args:
        widths: slots of a pass, increasing.
        seconds: for each width the seconds of a pass, positive. Made non-decreasing, since a wider pass that
            seems cheaper is noise.

    Raises:
        InputError: fewer than two widths, or lengths and order that do not fit.
    """

    widths: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or len(self.widths) != len(self.seconds):
            raise InputError("widths: at least two, with one time each")
        if any(a >= b for a, b in zip(self.widths, self.widths[1:], strict=False)) or min(self.seconds) <= 0:
            raise InputError("widths: must increase, and seconds be positive")
        object.__setattr__(self, "seconds", tuple(np.maximum.accumulate(self.seconds).tolist()))

    def __call__(self, width: int) -> float:
        """Seconds of a pass over `width` slots."""
        if width > self.widths[-1]:
            slope = (self.seconds[-1] - self.seconds[-2]) / (self.widths[-1] - self.widths[-2])
            return self.seconds[-1] + slope * (width - self.widths[-1])
        return float(np.interp(width, self.widths, self.seconds))


def measure_cost(
    session: Session, widths: tuple[int, ...] = WIDTHS, context: int = 128, repeats: int = 5
) -> CostCurve:
    """Time passes of each width over a context of `context` tokens; the session is emptied.

    Each width is given the fastest of its passes, since what else the machine does can only add to them; widths
    alternate, so that a slow moment does not fall on one of them alone.
    """
    session.rollback(0)
    session.prefill([1] * min(context, session.context_limit // 2))
    times: dict[int, list[float]] = {width: [] for width in widths}
    for repeat in range(repeats + 1):
        for width in widths:
            begun = time.perf_counter()
            # Siblings, so that a wide pass needs no more of the context than a narrow one.
            session.extend(TokenTree.of([2] * width, [ROOT] * width))
            if repeat:  # the first round warms up
                times[width].append(time.perf_counter() - begun)
            session.rollback()
    session.rollback(0)
    return CostCurve(widths, tuple(min(times[width]) for width in widths))


def kept_cost(session: Session) -> CostCurve:
    """The cost curve of this model on this machine: measured on the first call, then kept in the cache folder."""
    model = session.model
    facts = {
        **machine_facts(),
        "config": model.config.to_dict(),
        "dtype": str(model.dtype),
        "device": str(model.device),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    path = cache_folder() / "costs" / f"{key}.json"
    if path.exists():
        kept = json.loads(path.read_text())
        return CostCurve(tuple(kept["widths"]), tuple(kept["seconds"]))
    curve = measure_cost(session)
    with atomic_write(path) as out:
        json.dump(asdict(curve), out)
    return curve
