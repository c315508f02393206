"""How much an answer has in common with the expected one: ROUGE by rouge-score, BLEU and chrF by sacrebleu."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Characters that stand for a word or a syllable each, or of scripts without spaces between words: Han, kana (with half-width
# forms), Hangul, Thai and Lao, Burmese, Khmer.
KANA, HAN = "\u3040-\u30ff\uff66-\uff9f", "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
CHARACTER = re.compile(f"[{KANA}{HAN}\uac00-\ud7a3\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
ROUGES = ("rouge1", "rouge2", "rougeL")


class WordTokenizer:
    """rouge-score's words, of every script: its own keeps a-z and 0-9 only, and scores Russian against itself with 0.

    A word is letters and digits with their marks, in lower case; a character of a script without spaces is a word.
    """

    def tokenize(self, text: str) -> list[str]:
        kept = "".join(it if it.isalnum() or unicodedata.category(it)[0] == "M" else " " for it in text.lower())
        return CHARACTER.sub(r" \g<0> ", kept).split()


@functools.cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGES), tokenizer=WordTokenizer())


def rouge_scores(answer: str, expected: str) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, between 0 and 1."""
    found = _rouge().score(expected, answer)
    return {name: float(found[name].fmeasure) for name in ROUGES}


@functools.cache
def _metric(name: str, tokenize: str) -> Any:
    from sacrebleu.metrics import BLEU, CHRF

    return CHRF() if name == "chrf" else BLEU(tokenize=tokenize)


class CorpusMetric:
    """BLEU or chrF over many rows, from what is counted in each of them.

    sacrebleu sums these counts over a corpus; so do its own resampling tests, through the same two methods, which have
    no public name (sacrebleu 2.4 to 2.6). A test compares the sums with its public corpus_score.
    """

    def __init__(self, name: str, tokenize: str = "13a") -> None:
        self._metric = _metric(name, tokenize)

    def counts(self, answer: str, expected: str) -> list[float]:
        """The counts of one row."""
        (row,) = self._metric._extract_corpus_statistics([answer], [[expected]])
        return [float(value) for value in row]

    def scores(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """The score, 0 to 100, of each row of summed counts [..., counts]."""
        flat = sums.reshape(-1, sums.shape[-1])
        values = [self._metric._compute_score_from_stats([int(value) for value in row]).score for row in flat]
        return np.asarray(values, dtype=np.float64).reshape(sums.shape[:-1])


def bleu_tokenizer(texts: Sequence[str]) -> str:
    """sacrebleu's tokenizer for what is mostly Chinese (`zh`) or otherwise without spaces (`char`), else its default."""
    text = "".join(texts)
    letters, characters = sum(map(str.isalpha, text)), len(CHARACTER.findall(text))
    if 2 * characters <= letters or not characters:
        return "13a"
    return "zh" if 10 * len(re.findall(f"[{HAN}]", text)) > 9 * characters else "char"
