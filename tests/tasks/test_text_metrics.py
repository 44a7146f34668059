"""ROUGE, BLEU, chrF and TER, against values that the libraries publish and others made by hand."""

from __future__ import annotations

import math
from itertools import zip_longest

import pytest
import sacrebleu

from adalora.data import read_rows, sample
from adalora.tasks.text_metrics import bleu_chrf_ter, rouge, sentences, signatures

from ..data import benchmark_data

# The example of sacrebleu's README, and its score in sacrebleu's own tests.
ANSWERS = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


def test_bleu_of_sacrebleu_and_its_signature() -> None:
    assert bleu_chrf_ter(ANSWERS, REFERENCES)["bleu"] == pytest.approx(48.530827, abs=1e-6)
    found = signatures(REFERENCES)
    version = found["bleu"].rsplit(":", 1)[1]
    assert found == {
        "bleu": f"nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:{version}",
        "chrf": f"nrefs:2|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{version}",
        "ter": f"nrefs:2|case:lc|tok:tercom|norm:no|punct:yes|asian:no|version:{version}",
    }


def test_bleu_by_hand() -> None:
    """Six words, of which six, four pairs, two triples and one quadruple are in the reference, which has seven."""
    found = bleu_chrf_ter(["the cat sat on a mat"], [["the cat sat on", "a mat on the cat sat there"]])["bleu"]
    # the closest length is the first reference's (4) or the second's (7): 7, one away
    matches = (6 / 6) * (4 / 5) * (2 / 4) * (1 / 3)
    assert found == pytest.approx(100 * math.exp(1 - 7 / 6) * matches**0.25)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("aaaa bbbb cccc dddd", "aaaa bbbb cccc dddd", 0),
        ("dddd eeee ffff", "aaaa bbbb cccc", 100),
        ("", "a", 100),
        ("d e f g h a b c", "a b c d e f g h", 100 / 8),  # one shift
        ("a b x d", "a b c d e", 100 * 2 / 5),  # a substitution and an insertion
    ],
)
def test_ter(answer: str, reference: str, score: float) -> None:
    """All but the last from sacrebleu's own tests."""
    assert bleu_chrf_ter([answer], [[reference]])["ter"] == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("", "reference", 0),
        ("Niemand hat die Absicht, eine Mauer zu errichten", "Niemand hat die Absicht, eine Mauer zu errichten", 100),
        # one order of which precision is 1/1 and recall 1/2: F2 = 5 · 1 · ½ / (4 · 1 + ½)
        ("a", "ab", 100 * 2.5 / 4.5),
    ],
)
def test_chrf(answer: str, reference: str, score: float) -> None:
    """The first two from sacrebleu's own tests, the last by hand."""
    assert bleu_chrf_ter([answer], [[reference]])["chrf"] == pytest.approx(score)


def test_references_may_differ_in_number() -> None:
    """As many streams as the row with the most references has; a row without more adds nothing to the others."""
    uneven = [REFERENCES[0], REFERENCES[1][:1], [*REFERENCES[2], "The man had just bitten him."]]
    assert signatures(uneven)["bleu"].startswith("nrefs:var|")
    streams = [
        [row[k] if k < len(row) else None for row in uneven]  # what sacrebleu documents
        for k in range(3)
    ]
    assert bleu_chrf_ter(ANSWERS, uneven)["bleu"] == pytest.approx(sacrebleu.corpus_bleu(ANSWERS, streams).score)
    repeated = [[row[0]] * count for row, count in zip(REFERENCES, (1, 4, 2), strict=True)]
    once = bleu_chrf_ter(ANSWERS, [row[:1] for row in REFERENCES])
    assert bleu_chrf_ter(ANSWERS, repeated) == pytest.approx(once)


def test_ter_is_sacrebleus_on_real_texts() -> None:
    """Not every reference is searched, and yet it is the same number."""
    rows = sample(read_rows(str(benchmark_data("web_nlg/webnlg_challenge_2017")), "dev"), 60)
    texts = [texts for lex in rows["lex"] if len(texts := lex["text"]) >= 2 and len(texts[0]) < 120]
    answers, references = [first for first, *_ in texts], [others for _, *others in texts]
    answers[:3] = ["", references[1][0].upper(), "a of the in"]
    streams = list(zip_longest(*references))
    expected = sacrebleu.corpus_ter(answers, streams).score  # type: ignore[arg-type]
    assert 20 < expected < 80 and bleu_chrf_ter(answers, references)["ter"] == pytest.approx(expected)
    assert {len(others) for others in references} == {1, 2}


def test_answers_that_say_nothing() -> None:
    empty = ["", "", ""]
    # all words of the shortest references are missing (5, 4 and 5), out of the references' mean lengths
    assert bleu_chrf_ter(empty, REFERENCES) == {"bleu": 0, "chrf": 0, "ter": pytest.approx(100 * 14 / (5.5 + 4 + 5.5))}
    assert rouge(empty, REFERENCES, ["rouge1", "rougeLsum"]) == {"rouge1": 0, "rougeLsum": 0}
    partly = bleu_chrf_ter(["The dog bit the man.", "", ""], REFERENCES)["bleu"]
    assert 0 < partly < bleu_chrf_ter(ANSWERS, REFERENCES)["bleu"]


def test_no_answers_have_no_quality() -> None:
    found = bleu_chrf_ter([], []) | rouge([], [], ["rouge1", "rougeL"])
    assert list(found) == ["bleu", "chrf", "ter", "rouge1", "rougeL"] and all(map(math.isnan, found.values()))


@pytest.mark.parametrize(
    ("kind", "answer", "score"),
    [("rouge1", "testing", 1 / 2), ("rouge2", "testing one", 2 / 3), ("rougeL", "testing two", 4 / 5)],
)
def test_rouge(kind: str, answer: str, score: float) -> None:
    """F-measures from rouge-score's own tests."""
    assert rouge([answer], [["testing one two"]], [kind])[kind] == pytest.approx(100 * score)


def test_rouge_of_several_sentences() -> None:
    """The example of Lin (2004), section 3.2, in rouge-score's own tests: recall 4/5, precision 4/10."""
    for answer in ("w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "W1 w3 w8 w9 w5. W1 w2 w6 w7 w8."):
        assert rouge([answer], [["w1 w2 w3 w4 w5"]], ["rougeLsum"])["rougeLsum"] == pytest.approx(100 * 0.64 / 1.2)
    whole = rouge(["W1 w3 w8 w9 w5. W1 w2 w6 w7 w8."], [["w1 w2 w3 w4 w5"]], ["rougeL"])["rougeL"]
    assert whole == pytest.approx(100 * 2 * 0.3 * 0.6 / 0.9)  # w1 w3 w5 alone are in order


def test_rouge_stems_and_takes_the_best_reference() -> None:
    assert rouge(["He was Running!"], [["he is runs"]], ["rouge1"])["rouge1"] == pytest.approx(100 * 2 / 3)
    references = [["nothing of it", "a b c d"], ["x y"]]
    assert rouge(["a b c", "x"], references, ["rouge1"])["rouge1"] == pytest.approx(100 * (6 / 7 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Lines without stops\nare sentences .\n\n", ["Lines without stops", "are sentences ."]),
        ('He said: "Go." Then he went.', ['He said: "Go."', "Then he went."]),
        ("The U.S. Army met Dr. J. R. Smith. It cost £3.5.", ["The U.S. Army met Dr. J. R. Smith.", "It cost £3.5."]),
        ("All in e.g. one.", ["All in e.g. one."]),
        ("Ends here.Not here. 5 came.", ["Ends here.Not here.", "5 came."]),
        (" ", []),
    ],
)
def test_sentences(text: str, found: list[str]) -> None:
    assert sentences(text) == found
