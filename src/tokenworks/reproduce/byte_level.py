"""Byte-level (arXiv 2410.09303): is the bias of cut prompts gone, and do two tokenizers agree to write together?

The paper reports about 18% better infilling of code when prompts end inside a token, always ahead of token
healing, and ensembles across vocabularies up to 3.7% ahead of their members (CodeLlama 7B, Llama 2, Mistral, Yi).
Here, with SmolLM2-135M and Gemma-3-270M:

    cuts       the next byte after prompts cut inside a token, and between two: bits, by three ways of asking
    lines      lines of code cut inside a name and finished greedily: how many come out as written
    passages   English, code and other languages: bits a byte of each model and of the mean of both
    checks     the next byte at the usual tolerance against trying every token and running every row
"""

from __future__ import annotations

import math
import random
import time
from functools import partial
from typing import Any

import numpy as np
import torch

from tokenworks.core.measure import Interval, bootstrap, mean_interval
from tokenworks.core.models import load
from tokenworks.core.session import Session
from tokenworks.decode.byte_level import ByteEnsemble, ByteLM
from tokenworks.reproduce import Run
from tokenworks.reproduce.byte_baselines import Baselines, complete_bytes
from tokenworks.reproduce.byte_texts import OTHERS, cut_line, cut_token, passage
from tokenworks.reproduce.ledger import Ledger
from tokenworks.reproduce.result import Figure, Result, exact, figure

MODELS = ("smollm2-135m", "gemma-3-270m")
WAYS = ("naive", "healing", "exact")
LIMIT = 24
SIZES = {"inside": 40, "between": 20, "lines": 20, "passages": 5, "checks": 4}
QUICK = {"inside": 4, "between": 2, "lines": 2, "passages": 2, "checks": 1}
"""Cuts and lines a model, passages of each kind, checks: for each seed."""

Piece = dict[str, Any]
Pieces = dict[str, list[Piece]]


def run(settings: Run) -> Result:
    """Measure, in about twelve minutes a seed on one CPU core; `quick` takes one."""
    begun = time.perf_counter()
    sizes = QUICK if settings.quick else SIZES
    length = 60 if settings.quick else 150
    bench = _Bench(length)
    facts = {"sizes": sizes, "limit": LIMIT, "passage_bytes": length}
    ledger = Ledger(settings.folder / "unfinished" / "byte-level", {**facts, "torch": torch.__version__})
    work = [(kind, name, seed, number) for seed in range(settings.seeds)
            for kind, name, count in (
                *((kind, name, sizes[kind]) for kind in ("inside", "between", "lines") for name in MODELS),
                *(("passages", kind, sizes["passages"]) for kind in ("English", "code", "others")),
                ("checks", MODELS[0], sizes["checks"]),
            ) for number in range(count)]  # fmt: skip
    pieces: Pieces = {kind: [] for kind in SIZES}
    for done, (kind, name, seed, number) in enumerate(work):
        settings.progress(done, len(work), f"{kind}: {name}")
        piece = ledger.once(f"{kind}/{name}/{seed}/{number}", partial(bench.measure, kind, name, seed, number))
        pieces[kind].append(piece)
    trace = bench.both.generate("Grüße! The capital of Fran", 60).trace(MODELS)
    trace.meta["title"] = "Byte-level: two models with different tokenizers go on from “The capital of Fran”"
    settings.progress(len(work), len(work), "done")
    result = Result(
        slug="byte-level",
        claim="",
        figures=figures(pieces),
        seeds=list(range(settings.seeds)),
        seconds=time.perf_counter() - begun,
        model=" and ".join(MODELS),
        settings={**facts, "sampling": "greedy", "weights": "equal"},
        table=table(pieces),
        traces=[trace.to_dict()],
        notes=[
            "A cut between two tokens of a text tells what the text does not say, that no longer token comes: the "
            "naive way profits from this, and need not agree with the exact one there.",
            "The code and the English are Python's own, which both models may have seen; the other languages were "
            "written for this measurement.",
        ],
    )
    ledger.close()
    return result


class _Bench:
    """The two models, each read by bytes and by tokens."""

    def __init__(self, length: int) -> None:
        self.length = length
        loaded = {name: load(name) for name in MODELS}
        self.readers = {name: ByteLM(Session(each.model), each.tokenizer) for name, each in loaded.items()}
        self.by_tokens = {
            name: Baselines(self.readers[name], Session(each.model), each.tokenizer)
            for name, each in loaded.items()
        }
        self.both = ByteEnsemble(list(self.readers.values()))
        first = loaded[MODELS[0]]
        self.strict = ByteLM(Session(first.model), first.tokenizer, tolerance=0.0)

    def measure(self, kind: str, name: str, seed: int, number: int) -> Piece:
        chance = random.Random(f"{kind}/{name}/{seed}/{number}")
        if kind in ("inside", "between"):
            return self._cut(name, kind == "inside", number, chance)
        if kind == "lines":
            return self._line(name, chance)
        return self._passage(name, seed, number, chance) if kind == "passages" else self._check(number, chance)

    def _cut(self, name: str, inside: bool, number: int, chance: random.Random) -> Piece:
        encodings = self.readers[name].encodings

        def lengths(text: str) -> list[int]:
            return [len(encodings.vocabulary.pieces[token] or b"") for token in encodings.encode(text)]

        cut = cut_token("code" if number % 2 else "English", lengths, inside, chance)
        self.readers[name].start(cut.prompt)
        said = {
            "naive": self.by_tokens[name].naive(cut.prompt),
            "healing": self.by_tokens[name].healing(cut.prompt),
            "exact": self.readers[name].next_byte().exp().numpy(),
        }
        byte = cut.rest.encode()[0]
        return {
            "model": name,
            "bits": {way: -math.log2(max(float(p[byte]), 1e-12)) for way, p in said.items()},
            "right": {way: int(p.argmax()) == byte for way, p in said.items()},
        }

    def _line(self, name: str, chance: random.Random) -> Piece:
        cut, reader, plain = cut_line(LIMIT, chance), self.readers[name], self.by_tokens[name]
        wanted = cut.rest.encode()
        written, seconds, before = {}, {}, reader.passes
        for way in WAYS:
            begun = time.perf_counter()
            if way == "exact":
                written[way] = complete_bytes(reader, cut.prompt, LIMIT + 1)
            else:
                written[way] = plain.complete(cut.prompt, LIMIT + 1, way == "healing")
            seconds[way] = time.perf_counter() - begun
        return {
            "model": name,
            "wanted": cut.rest,
            "written": {way: text.decode(errors="replace") for way, text in written.items()},
            "right": {way: text == wanted for way, text in written.items()},
            "seconds": seconds,
            "bytes": {way: len(text) + 1 for way, text in written.items()},
            "passes": reader.passes - before,
        }

    def _passage(self, kind: str, seed: int, number: int, chance: random.Random) -> Piece:
        if kind == "others":
            texts = [text for language in OTHERS.values() for text in language]
            text = texts[(seed * SIZES["passages"] + number) % len(texts)]
        else:
            text = passage(kind, self.length, chance)
        data = text.encode()[: self.length]
        self.both.start()
        mean = self.both.log_probs(data)
        bits = {name: float(-row.sum() / math.log(2)) for name, row in zip(MODELS, self.both.read, strict=True)}
        return {"kind": kind, "bytes": len(data), "bits": bits | {"both": float(-mean.sum() / math.log(2))}}

    def _check(self, number: int, chance: random.Random) -> Piece:
        name = MODELS[0]
        text = passage("code" if number % 2 else "English", 120, chance)
        prompt = text[: chance.randrange(60, 120)]
        rows = []
        for reader in (self.readers[name], self.strict):
            reader.start(prompt)
            rows.append(reader.next_byte().exp())
        return {"distance": float((rows[0] - rows[1]).abs().sum() / 2)}


def column(pieces: list[Piece], what: str, way: str, model: str | None = None) -> np.ndarray:
    """One number a piece, of one model or all."""
    return np.array([piece[what][way] for piece in pieces if model in (None, piece["model"])], dtype=float)


def bits_a_byte(pieces: list[Piece], name: str, kind: str | None = None) -> np.ndarray:
    """Of each passage."""
    return np.array([piece["bits"][name] / piece["bytes"] for piece in pieces if kind in (None, piece["kind"])])


def figures(pieces: Pieces) -> list[Figure]:
    """Thresholds are the dossier's, fixed before anything was run."""
    found = []
    for name in MODELS:
        for way, least in (("naive", 0.5), ("healing", 0.0)):
            ours, theirs = (column(pieces["inside"], "bits", each, name) for each in ("exact", way))
            found.append(
                figure(f"Inside a token, fewer bits for the next byte than {way}, {name}", "bits",
                       mean_interval(theirs - ours), least, 0.0, ours=float(ours.mean()),
                       baseline=float(theirs.mean()), baseline_name=way, paper="the bias is gone", headline=True)
            )  # fmt: skip
        ours, theirs = (column(pieces["between"], "bits", each, name) for each in ("exact", "naive"))
        found.append(
            figure(f"Between tokens, fewer bits for the next byte than naive, {name}", "bits",
                   mean_interval(theirs - ours), -0.05, -0.05, ours=float(ours.mean()),
                   baseline=float(theirs.mean()), baseline_name="naive", paper="equal")
        )  # fmt: skip
    for way in ("naive", "healing"):
        ours, theirs = (column(pieces["lines"], "right", each) for each in ("exact", way))
        found.append(
            figure(f"More lines finished as written than by {way}", "share", mean_interval(ours - theirs),
                   1e-9, 0.0, ours=float(ours.mean()), baseline=float(theirs.mean()), baseline_name=way,
                   paper="about 18% more than naive, always more than healing", headline=True)
        )  # fmt: skip
    alone = {name: bits_a_byte(pieces["passages"], name) for name in MODELS}
    best = min(alone, key=lambda name: float(alone[name].mean()))
    both = bits_a_byte(pieces["passages"], "both")
    found.append(
        figure(f"Fewer bits a byte than the better model alone ({best})", "bits a byte",
               mean_interval(alone[best] - both), 1e-9, 0.0, ours=float(both.mean()),
               baseline=float(alone[best].mean()), baseline_name=best,
               paper="up to 3.7% better scores than the members", headline=True)
    )  # fmt: skip
    worst = max(piece["distance"] for piece in pieces["checks"])
    found.append(
        figure("Next byte at the usual tolerance: 1 - distance to the exact one, the worst prompt", "share",
               exact(1 - worst), 0.999, 0.99, ours=1 - worst)
    )  # fmt: skip
    for name in MODELS:
        lines = [piece for piece in pieces["lines"] if piece["model"] == name]
        found.append(
            figure(f"Bytes for each forward pass, {name}", "bytes", _bytes_a_pass(lines), 1.0, 1.0,
                   ours=_bytes_a_pass(lines).value, baseline=1.0, baseline_name="the paper's",
                   paper="one pass a byte")
        )  # fmt: skip
    return found


def _bytes_a_pass(lines: list[Piece]) -> Interval:
    written = np.array([piece["bytes"]["exact"] for piece in lines], dtype=float)
    passes = np.array([piece["passes"] for piece in lines], dtype=float)
    return bootstrap(lambda items: float(written[items].sum() / passes[items].sum()), len(lines))


def table(pieces: Pieces) -> list[dict[str, Any]]:
    """All ways of all experiments."""
    rows: list[dict[str, Any]] = []

    def add(what: str, model: str, way: str, value: object, unit: str) -> None:
        rows.append({"what": what, "model": model, "way": way, "value": str(value), "unit": unit})

    for name in MODELS:
        for kind in ("inside", "between"):
            for way in WAYS:
                add(f"next byte, cut {kind} tokens", name, way,
                    mean_interval(column(pieces[kind], "bits", way, name)), "bits")  # fmt: skip
                right = column(pieces[kind], "right", way, name)
                add(f"next byte, cut {kind} tokens", name, way, f"{right.mean():.3f}", "likeliest is right")
        for way in WAYS:
            right = column(pieces["lines"], "right", way, name)
            add("lines", name, way, f"{right.sum():.0f} of {len(right)}", "as written")
            cost = column(pieces["lines"], "seconds", way, name).sum()
            cost /= column(pieces["lines"], "bytes", way, name).sum()
            add("lines", name, way, f"{1000 * cost:.0f}", "ms a byte, prompt included")
    for kind in dict.fromkeys(piece["kind"] for piece in pieces["passages"]):
        for name in (*MODELS, "both"):
            add(f"passages, {kind}", name, "exact", mean_interval(bits_a_byte(pieces["passages"], name, kind)),
                "bits a byte")  # fmt: skip
    return rows
