"""Words: how a text is cut into tokens, and how a token is spelled for the embedding.

A token is looked up as a word (of the training texts) and as its hashed character n-grams, so that a word
never seen in training still has a place near its relatives, and the same place on both sides of a pair.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable

MAX_LENGTH = 40
"""Tokens of a text that the model reads; the rest is cut off."""

PAD, UNKNOWN = 0, 1
NGRAMS = (3, 4)
BUCKETS = 4096

# Numbers with their separators, words with their apostrophes, a mark (repeated: still one).
_TOKEN = re.compile(r"\d+(?:[.,:]\d+)*|[^\W_]+(?:'[^\W_]+)*|([^\w\s]|_)\1*")
_TYPOGRAPHIC = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014", "''\"\"--")

# The usual function words of English: they say little about what a text is about.
_STOP_WORDS = """
    a about all am an and any are as at be been but by can can't could did didn't do does doesn't doing
    don't for from had has have he her him his how i i'm if in into is isn't it it's its just me more most my
    no not of on one only or other our out she should so some than that that's the their them then there these
    they this those to too up was wasn't we were what what's when where which who who's whom whose why will
    with would you you're your
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


def normalize(text: str) -> str:
    """One line, lower-case, plain quotes."""
    return " ".join(text.translate(_TYPOGRAPHIC).lower().split())


def tokenize(text: str) -> list[str]:
    """Words, numbers and punctuation marks in order, lower-case."""
    return [match.group(1) or match.group() for match in _TOKEN.finditer(normalize(text))]


def words(text: str) -> list[str]:
    """The tokens without punctuation, at full length."""
    return [token for token in tokenize(text) if is_word(token)]


def identity(text: str) -> str:
    """Two texts count as the same text if this is the same: case, white space and marks aside."""
    return " ".join(words(text)) or normalize(text)


def is_word(token: str) -> bool:
    return token[0].isalnum()


class Vocabulary:
    """The words of the training texts, their inverse document frequencies, and how a token is spelled."""

    def __init__(self, texts: Iterable[str]) -> None:
        documents = Counter[str]()
        self.texts = 0
        for text in texts:
            documents.update(set(tokenize(text)))
            self.texts += 1
        self._documents = documents
        self._ids = {token: index for index, token in enumerate(sorted(documents), start=UNKNOWN + 1)}

    @property
    def pieces(self) -> int:
        """How many embedding rows the spelling needs: pad, unknown, words, n-gram buckets."""
        return UNKNOWN + 1 + len(self._ids) + BUCKETS

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, token: str) -> bool:
        return token in self._ids

    def idf(self, token: str) -> float:
        """log((1 + N) / (1 + n)) for a token in n of N training texts; an unknown one is the rarest."""
        return math.log((1 + self.texts) / (1 + self._documents[token]))

    def spell(self, token: str) -> list[int]:
        """The embedding rows that a token is the mean of: its word (or unknown) and its n-grams."""
        marked = f"<{token}>"
        grams = (
            [marked[i : i + n] for n in NGRAMS for i in range(len(marked) - n + 1)] if is_word(token) else []
        )
        first = UNKNOWN + 1 + len(self._ids)
        # crc32 and not hash(): the same bucket in every process.
        return [self._ids.get(token, UNKNOWN), *(first + zlib.crc32(g.encode()) % BUCKETS for g in grams)]
