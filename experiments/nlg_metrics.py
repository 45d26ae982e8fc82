"""The metrics of the paper's generation tasks, from established packages.

All ignore case. They aren't the scripts that the papers used, so a value is
comparable to another one from here first of all:

- BLEU and TER: sacrebleu (13a tokens); NIST: nltk, on the same tokens.
- METEOR: nltk's, with WordNet alone. It isn't the Java METEOR of the papers,
  whose paraphrase tables give other values.
- ROUGE-L: rouge-score, F1 with the best reference.
- CIDEr: pycocoevalcap's CIDEr-D, on words without punctuation.
"""

import re
import statistics

METRICS = ("BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr", "TER")
WORD = re.compile(r"\w+(?:[-.,:/']\w+)*")


def score(hypotheses, references, metrics=METRICS):
    """Scores generated texts.

    Args:
        hypotheses: list of str.
        references: a list of str for each of them.
        metrics: names from `METRICS`.

    Returns:
        Dict of name to value. BLEU, METEOR and ROUGE-L are in 0..100, TER is
        edits per word (lower is better), as in the paper.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise ValueError(f"`metrics` must be in {METRICS}. Received: {unknown}")
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(
            "Every hypothesis must have its list of references. Received: "
            f"{len(hypotheses)} hypotheses, {len(references)} lists"
        )
    if not all(references):
        raise ValueError(
            "Every hypothesis must have a reference. Received: none for "
            f"number {[bool(r) for r in references].index(False)}"
        )
    return {
        name: float(_FUNCTIONS[name](hypotheses, references))
        for name in metrics
    }


def available_metrics():
    """`METRICS`, without METEOR where WordNet is missing, which is printed."""
    try:
        _wordnet()
    except RuntimeError as error:
        print(f"METEOR is left out. {error}")
        return tuple(name for name in METRICS if name != "METEOR")
    return METRICS


def _streams(references):
    """Sacrebleu's layout: the first references, the second ones, …"""
    most = max(map(len, references))
    padded = [[*texts, *[None] * (most - len(texts))] for texts in references]
    return [list(stream) for stream in zip(*padded, strict=True)]


def _bleu(hypotheses, references):
    import sacrebleu

    metric = sacrebleu.BLEU(lowercase=True)
    return metric.corpus_score(hypotheses, _streams(references)).score


def _ter(hypotheses, references):
    import sacrebleu

    metric = sacrebleu.TER()
    return metric.corpus_score(hypotheses, _streams(references)).score / 100


def _nist(hypotheses, references):
    from nltk.translate.nist_score import corpus_nist
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()
    hypotheses = [tokenize(text.lower()).split() for text in hypotheses]
    references = [
        [tokenize(text.lower()).split() for text in texts]
        for texts in references
    ]
    try:
        return corpus_nist(references, hypotheses, n=5)
    except ZeroDivisionError:  # no hypothesis has five words
        return 0.0


def _meteor(hypotheses, references):
    from nltk.translate.meteor_score import meteor_score

    wordnet = _wordnet()
    return 100 * statistics.fmean(
        meteor_score(
            [_words(text) for text in texts], _words(text), wordnet=wordnet
        )
        for text, texts in zip(hypotheses, references, strict=True)
    )


def _wordnet():
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        raise RuntimeError(
            "METEOR needs WordNet: `python -m nltk.downloader wordnet` "
            "fetches it, NLTK_DATA says where it is."
        ) from error
    return wordnet


def _rouge_l(hypotheses, references):
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return 100 * statistics.fmean(
        scorer.score_multi(texts, text)["rougeL"].fmeasure
        for text, texts in zip(hypotheses, references, strict=True)
    )


def _cider(hypotheses, references):
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer()
    for text, texts in zip(hypotheses, references, strict=True):
        scorer += (" ".join(_words(text)), [" ".join(_words(t)) for t in texts])
    return scorer.compute_score()[0]


def _words(text):
    return WORD.findall(text.lower())


_FUNCTIONS = {
    "BLEU": _bleu,
    "NIST": _nist,
    "METEOR": _meteor,
    "ROUGE-L": _rouge_l,
    "CIDEr": _cider,
    "TER": _ter,
}
