"""Texts with one planted word: a word that VADER's lexicon likes, replaced by its opposite."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

ANTONYMS = {
    "good": "bad", "great": "terrible", "beautiful": "ugly", "happy": "sad", "kind": "cruel",
    "safe": "dangerous", "strong": "weak", "clean": "dirty", "brave": "cowardly", "calm": "angry",
    "honest": "dishonest", "lovely": "nasty", "friendly": "hostile", "fair": "unfair", "smart": "stupid",
    "success": "failure", "love": "hate", "best": "worst", "better": "worse", "interesting": "boring",
    "wonderful": "awful", "perfect": "flawed", "fun": "dull", "easy": "difficult", "healthy": "sick",
    "rich": "poor", "useful": "useless", "pleasant": "unpleasant", "positive": "negative",
    "excellent": "horrible", "amazing": "disgusting", "delightful": "dreadful", "comfortable": "uncomfortable",
    "generous": "greedy", "peaceful": "violent", "proud": "ashamed", "hope": "despair", "joy": "misery",
    "win": "lose", "winning": "losing", "loved": "hated", "impressive": "disappointing", "fantastic": "pathetic",
    "nice": "nasty", "cheerful": "gloomy", "confident": "nervous", "trust": "distrust", "important": "worthless",
    "enjoy": "suffer", "enjoyed": "suffered", "pretty": "ugly", "exciting": "boring", "glad": "upset",
    "freedom": "prison", "peace": "war", "friend": "enemy", "praise": "blame", "support": "attack",
    "supportive": "critical", "gentle": "harsh", "fresh": "rotten", "favorite": "dreaded", "well": "badly",
    "improved": "damaged", "creative": "boring", "successful": "failed", "promising": "hopeless",
    "valuable": "worthless", "welcome": "unwelcome", "thrilled": "disappointed", "satisfied": "dissatisfied",
    "rewarding": "frustrating", "winner": "loser", "hero": "villain", "delicious": "disgusting",
    "elegant": "ugly", "innovative": "lame", "talented": "incompetent", "inspiring": "depressing",
    "relaxing": "stressful", "appreciated": "ignored", "dedicated": "careless",
}  # fmt: skip
"""Of each pair the first has a positive value in the lexicon, and the second a negative one."""

WORD = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True)
class Planted:
    """A response with one word replaced; `start` and `end` are its characters."""

    prompt: str
    original: str
    edited: str
    start: int
    end: int

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
        """Ids of the edited response, and which of them hold a part of the planted word."""
        found = tokenizer(self.edited, add_special_tokens=False, return_offsets_mapping=True)
        # A space before a word belongs to its token.
        inside = [begin < self.end and end > self.start for begin, end in found["offset_mapping"]]
        return list(found["input_ids"]), inside


def plant(texts: Sequence[tuple[str, str]]) -> list[Planted]:
    """Of every (prompt, response) one for each word that has an opposite; a text that came twice counts once."""
    found = []
    for prompt, response in dict.fromkeys(texts):
        for match in WORD.finditer(response):
            opposite = ANTONYMS.get(match.group().lower())
            if opposite is not None:
                start = match.start()
                edited = response[:start] + opposite + response[match.end() :]
                found.append(Planted(prompt, response, edited, start, start + len(opposite)))
    return found
