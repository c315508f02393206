"""ROUGE, BLEU and chrF: the numbers of the reference implementations, recorded, and what characters do."""

from __future__ import annotations

import numpy as np
import pytest

from sft_dist.evaluate.overlap import CorpusMetric, WordTokenizer, bleu_tokenizer, rouge_scores

ANSWERS = ["The quick brown dog jumps on the log.", "A cat sat on a mat, quietly.", "", "It is what it is."]
EXPECTED = [
    "The quick brown fox jumps over the lazy dog",
    "The cat sat on the mat.",
    "Nothing at all.",
    "It is what it is.",
]
CHINESE = [
    "\u8ba2\u5355\u5df2\u7ecf\u53d1\u8d27\uff0c\u8bf7\u7b49\u5f85\u3002",
    "\u60a8\u7684\u9000\u6b3e\u5df2\u5230\u8d26",
]
CHINESE_EXPECTED = [
    "\u8ba2\u5355\u5df2\u53d1\u8d27\uff0c\u8bf7\u8010\u5fc3\u7b49\u5f85\u3002",
    "\u60a8\u7684\u9000\u6b3e\u5df2\u7ecf\u5230\u8d26",
]  # fmt: skip
# What rouge-score 0.1.2 gives with its defaults; for Chinese, with a tokenizer that takes every letter for a word.
ROUGE = [(0.705882353, 0.266666667, 0.588235294), (0.615384615, 0.363636364, 0.615384615), (0, 0, 0), (1, 1, 1)]
CHINESE_ROUGE = [(0.842105263, 0.588235294, 0.842105263), (0.933333333, 0.769230769, 0.933333333)]
# corpus_score of sacrebleu 2.6.0, with tokenize="zh" for the BLEU of the Chinese lines.
CORPUS = {"bleu": (34.70173604128169, 48.81260447273355), "chrf": (50.30050826134551, 38.41341421236067)}
CHRF_OF_SENTENCES = (52.5324471643681, 41.18821628380154, 0.0, 100.0)


@pytest.mark.parametrize(
    ("answers", "expected", "recorded"), [(ANSWERS, EXPECTED, ROUGE), (CHINESE, CHINESE_EXPECTED, CHINESE_ROUGE)]
)
def test_rouge_is_that_of_rouge_score(
    answers: list[str], expected: list[str], recorded: list[tuple[float, ...]]
) -> None:
    pytest.importorskip("rouge_score")
    for answer, wanted, numbers in zip(answers, expected, recorded, strict=True):
        found = rouge_scores(answer, wanted)
        assert (found["rouge1"], found["rouge2"], found["rougeL"]) == pytest.approx(numbers, abs=1e-9)


def test_rouge_of_mixed_text_takes_words_as_words_and_characters_as_characters() -> None:
    pytest.importorskip("rouge_score")
    assert rouge_scores("order 12 \u5df2\u53d1", "\u5df2\u53d1 order 99")["rouge1"] == pytest.approx(3 / 4)
    assert rouge_scores("\u30ab\u30ca", "\u30ab\u30ca") == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}


# Russian, Arabic, Thai, Hindi, Greek, German, Khmer.
SCRIPTS = [
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440",
    "\u0645\u0631\u062d\u0628\u0627",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5",
    "Gr\u00fc\u00dfe aus K\u00f6ln",
    "\u1787\u1798\u17d2\u179a\u17b6\u1794",
]


@pytest.mark.parametrize("text", SCRIPTS)
def test_text_of_any_script_is_its_own_match(text: str) -> None:
    pytest.importorskip("rouge_score")
    assert rouge_scores(text, text)["rouge1"] == rouge_scores(text, text)["rougeL"] == 1.0
    assert rouge_scores("Where is it?", text)["rouge1"] == 0.0


def test_words_are_those_of_their_script() -> None:
    pytest.importorskip("rouge_score")
    assert WordTokenizer().tokenize("\u041f\u0420\u0418\u0412\u0415\u0422 \u043c\u0438\u0440_2") == [
        "\u043f\u0440\u0438\u0432\u0435\u0442", "\u043c\u0438\u0440", "2",
    ]  # fmt: skip
    assert WordTokenizer().tokenize("\u0928\u092e\u0938\u094d\u0924\u0947") == ["\u0928\u092e\u0938\u094d\u0924\u0947"]
    assert len(WordTokenizer().tokenize("\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35")) == 6


@pytest.mark.parametrize("text", [*ANSWERS, *EXPECTED, "It's 3.5%, e-mail: a_b@c.org; \u2014 \u2019tis", "A1-b2\t C\n"])
def test_english_has_the_words_of_rouge_score(text: str) -> None:
    tokenizers = pytest.importorskip("rouge_score.tokenizers")
    assert WordTokenizer().tokenize(text) == tokenizers.DefaultTokenizer(use_stemmer=False).tokenize(text)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_sums_over_rows_give_the_corpus_score_of_sacrebleu(name: str) -> None:
    pytest.importorskip("sacrebleu")
    for answers, expected, recorded in zip((ANSWERS, CHINESE), (EXPECTED, CHINESE_EXPECTED), CORPUS[name], strict=True):
        metric = CorpusMetric(name, bleu_tokenizer(expected))
        rows = np.array([metric.counts(*pair) for pair in zip(answers, expected, strict=True)])
        assert metric.scores(rows.sum(0)) == pytest.approx(recorded, abs=1e-9)
        several = np.stack([rows.sum(0), rows[0]])
        assert metric.scores(several).shape == (2,)
        assert metric.scores(several)[1] == metric.scores(rows[0])


def test_a_rows_own_score_is_that_of_the_sentence() -> None:
    pytest.importorskip("sacrebleu")
    metric = CorpusMetric("chrf")
    found = [float(metric.scores(np.array(metric.counts(*pair)))) for pair in zip(ANSWERS, EXPECTED, strict=True)]
    assert found == pytest.approx(CHRF_OF_SENTENCES, abs=1e-9)


def test_bleus_tokenizer_follows_the_script() -> None:
    assert bleu_tokenizer(EXPECTED) == "13a"
    assert bleu_tokenizer(CHINESE) == "zh"
    assert bleu_tokenizer(["\u6ce8\u6587\u306f\u767a\u9001\u3055\u308c\u307e\u3057\u305f"]) == "char"
    assert bleu_tokenizer([SCRIPTS[2]]) == "char"
    assert bleu_tokenizer(["", "12"]) == "13a"
