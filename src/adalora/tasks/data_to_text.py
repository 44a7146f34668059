"""A text that says what a table or some triples say: E2E, WebNLG, DART, or a user's own columns.

A model reads structured data as a line of text, its *linearisation*:

- a table of attributes and their values (E2E), ``name[The Vaults], near[Café Adriatic]`` in the data set's own
  notation, becomes ``name : The Vaults | near : Café Adriatic``;
- triples (WebNLG, DART), ``Aarhus_Airport | cityServed | "Aarhus, Denmark"`` in WebNLG's notation, become
  ``Aarhus Airport : cityServed : Aarhus, Denmark | ...``: underscores are spaces, quotes around a value are left out,
  the names of relations stay as they are, and so does the order of the triples.

From the command line, ``data_to_text/e2e`` takes a table in either notation, WebNLG and DART take triples that are
linearised already, and plain ``data_to_text`` takes, as in its data, any text as it is.

Rows with the same input are one input with the references of all of them, at evaluation: one answer is made and scored
once, against every reference. Training learns from each reference on its own. Copying the linearised input is the
baseline.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from datasets import Dataset
from pydantic import Field

from ..data import DataError
from .base import Columns, Options, register
from .generation import GenerationOptions
from .text_metrics import bleu_chrf_ter, rouge, signatures
from .text_task import Example, TextGeneration, references_of, shortened, text_of

_METRICS = ("bleu", "chrf", "ter", "rougeL")

# WebNLG 2017's training has these categories.
_SEEN = {"Airport", "Astronaut", "Building", "City", "ComicsCharacter"}
_SEEN |= {"Food", "Monument", "SportsTeam", "University", "WrittenWork"}

_ATTRIBUTE = re.compile(r"\s*(?P<name>[^\[\],]+?)\s*\[(?P<value>[^\[\]]*)\]\s*(?:,|$)")


def linearize_table(attributes: Iterable[tuple[str, str]]) -> str:
    """``name : The Vaults | near : Café Adriatic``"""
    return " | ".join(f"{name} : {value}" for name, value in attributes)


def linearize_triples(triples: Iterable[Sequence[str]]) -> str:
    """``Aarhus Airport : cityServed : Aarhus, Denmark | ...``"""
    return " | ".join(" : ".join(_words(part) for part in triple) for triple in triples)


def read_e2e(meaning_representation: Any, human_reference: Any = None) -> Example:
    """``name[The Vaults], near[Café Adriatic]``, or its linearisation, and a reference."""
    text = text_of(meaning_representation)
    attributes = [(found["name"], found["value"].strip()) for found in _ATTRIBUTE.finditer(text)]
    if attributes and not _ATTRIBUTE.sub("", text):
        return Example(linearize_table(attributes), references_of(human_reference))
    if _is_linear(text, parts=2):
        return Example(text, references_of(human_reference))
    raise DataError(f"expected attributes such as name[The Vaults], near[Café Adriatic], found {shortened(text)}")


def read_webnlg(modified_triple_sets: Any, lex: Any = None) -> Example:
    """``{"mtriple_set": [["Aarhus_Airport | cityServed | \\"Aarhus, Denmark\\"", ...]]}``, of whose sets the first
    counts, and ``{"text": [reference, ...]}``."""
    if isinstance(modified_triple_sets, str):
        return Example(_linear_triples(modified_triple_sets), references_of(lex))
    sets = modified_triple_sets.get("mtriple_set") if isinstance(modified_triple_sets, Mapping) else None
    lines = sets[0] if isinstance(sets, list) and sets and isinstance(sets[0], list) else []
    triples = [line.split(" | ") for line in lines if isinstance(line, str)]
    if not lines or [len(triple) for triple in triples] != [3] * len(lines):
        found = shortened(modified_triple_sets)
        raise DataError(f'expected {{"mtriple_set": [["subject | property | object", ...]]}}, found {found}')
    return Example(linearize_triples(triples), references_of(lex))


def read_dart(tripleset: Any, annotations: Any = None) -> Example:
    """``[["Mars Hill College", "JOINED", "1973"], ...]`` and ``{"text": [reference, ...]}``."""
    if isinstance(tripleset, str):
        return Example(_linear_triples(tripleset), references_of(annotations))
    triples = tripleset if isinstance(tripleset, list) else []
    if not triples or not all(_is_triple(triple) for triple in triples):
        raise DataError(f"expected [[subject, relation, object], ...] of texts, found {shortened(tripleset)}")
    return Example(linearize_triples(triples), references_of(annotations))


def read_text(text: Any, target: Any = None) -> Example:
    """A text that is read as it is, and a reference or a list of them."""
    return Example(text_of(text), references_of(target))


class DataToTextOptions(GenerationOptions):
    """Generation's options, with longer targets."""

    max_target_length: int = Field(128, ge=2, description="Tokens kept of a target, and of an answer at most.")


class Input(NamedTuple):
    """A distinct input, as it is scored."""

    answer: str
    references: list[str]


class _DataToText(TextGeneration):
    """BLEU, chrF, TER and ROUGE-L of one text for each distinct input."""

    max_length: ClassVar[int] = 256
    options: ClassVar[type[Options]] = DataToTextOptions
    headline: ClassVar[str] = "bleu"
    metric_names: ClassVar[tuple[str, ...]] = _METRICS
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"ter"})

    def scores(self, texts: Sequence[str], rows: Dataset) -> dict[str, float]:
        """Each distinct input counts once."""
        return _scores(self.inputs(texts, rows))

    def baseline(self, rows: Dataset) -> tuple[str, dict[str, float]]:
        """The linearised input itself."""
        return "the input itself", self.scores([example.text for example in self.examples(rows)], rows)

    def signatures(self, rows: Dataset) -> dict[str, str]:
        """How sacrebleu computes its metrics on these rows, in its own notation."""
        return signatures([found.references for found in self.inputs([""] * len(rows), rows)])

    def inputs(self, texts: Sequence[str], rows: Dataset) -> list[Input]:
        """The distinct inputs that rows hold, each with its text and the references of all of its rows."""
        found: dict[str, Input] = {}
        for text, example in zip(texts, self.examples(rows), strict=True):
            found.setdefault(example.text, Input(text, [])).references.extend(example.references)
        return list(found.values())


@register("data_to_text")
class DataToText(_DataToText):
    """A user's own columns: a text that is read as it is, and one text or a list of texts that say it well."""

    columns: ClassVar[Columns] = Columns("text", None, "target")
    read = staticmethod(read_text)


@register("data_to_text/e2e")
class E2E(_DataToText):
    """E2E (Novikova et al. 2017): restaurants; about eight references for each table."""

    columns: ClassVar[Columns] = Columns("meaning_representation", None, "human_reference")
    read = staticmethod(read_e2e)


@register("data_to_text/dart")
class Dart(_DataToText):
    """DART (Nan et al. 2021): triples from tables, WebNLG and E2E."""

    columns: ClassVar[Columns] = Columns("tripleset", None, "annotations")
    read = staticmethod(read_dart)


@register("data_to_text/webnlg")
class WebNLG(_DataToText):
    """WebNLG 2017 (Gardent et al.): one to seven triples of DBpedia, with metrics of all inputs, of those from the
    ten categories that training has, and of those from others.

    The hub's test split is three files, told apart by ``test_category``: ``testdata_with_lex`` is scored, the others
    repeat its inputs."""

    columns: ClassVar[Columns] = Columns("modified_triple_sets", None, "lex")
    metric_names: ClassVar[tuple[str, ...]] = (
        *_METRICS,
        *(f"{name}_{part}" for part in ("seen", "unseen") for name in _METRICS),
    )
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"ter", "ter_seen", "ter_unseen"})
    read = staticmethod(read_webnlg)

    def scores(self, texts: Sequence[str], rows: Dataset) -> dict[str, float]:
        """Metrics of all, of seen and of unseen categories; nan for a part that has no rows."""
        scored = self.scored(rows)
        categories = list(rows["category"]) if "category" in rows.column_names else [None] * len(rows)
        parts = {
            "": scored,
            "_seen": [index for index in scored if categories[index] in _SEEN],
            "_unseen": [index for index in scored if categories[index] not in {*_SEEN, None}],
        }
        return {
            f"{name}{part}": value
            for part, chosen in parts.items()
            for name, value in _scores(self.inputs([texts[i] for i in chosen], rows.select(chosen))).items()
        }

    def signatures(self, rows: Dataset) -> dict[str, str]:
        """On the rows that are scored."""
        return super().signatures(rows.select(self.scored(rows)))

    def scored(self, rows: Dataset, source: str = "the input") -> list[int]:
        """Those of ``testdata_with_lex`` where there are several files. DataError when there are none."""
        if "test_category" not in rows.column_names:
            return list(range(len(rows)))
        kinds = [kind or "" for kind in rows["test_category"]]
        found = [index for index, kind in enumerate(kinds) if kind in {"", "testdata_with_lex"}]
        if not found:
            raise DataError(
                f"column 'test_category' of {source} has no testdata_with_lex, the part to evaluate on: "
                f"it has {', '.join(sorted(set(kinds)))}"
            )
        return found


def _scores(inputs: Sequence[Input]) -> dict[str, float]:
    answers, references = [found.answer for found in inputs], [found.references for found in inputs]
    return bleu_chrf_ter(answers, references) | rouge(answers, references, ["rougeL"])


def _words(part: str) -> str:
    text = part.strip().replace("_", " ")
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def _is_triple(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(part, str) for part in value)


def _is_linear(text: str, parts: int) -> bool:
    return all(len(item.split(" : ")) >= parts for item in text.split(" | "))


def _linear_triples(text: str) -> str:
    if not _is_linear(text, parts=3):
        raise DataError(
            f"expected triples such as Aarhus : leaderName : Jacob Bundsgaard | ..., found {shortened(text)}"
        )
    return text.strip()
