"""SQuAD's two evaluation scripts, step by step as they are published: slow, and sharing nothing with ours.

``evaluate-v1.1.py`` (Rajpurkar et al., 2016) and ``evaluate-v2.0.py`` (Rajpurkar, Jia and Liang, 2018), the latter
without its search for the best threshold. Both take a data set as articles of paragraphs of questions, and the
predictions by the question's id.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

PUNCTUATION = set(string.punctuation)
Articles = list[dict[str, Any]]


def normalize(text: str) -> str:
    lowered = text.lower()
    without_punctuation = "".join(letter for letter in lowered if letter not in PUNCTUATION)
    without_articles = re.sub(r"\b(a|an|the)\b", " ", without_punctuation)
    return " ".join(without_articles.split())


def evaluate_v1(articles: Articles, predictions: dict[str, str]) -> dict[str, float]:
    """Keys exact_match and f1."""

    def f1_score(prediction: str, truth: str) -> float:
        prediction_tokens, truth_tokens = normalize(prediction).split(), normalize(truth).split()
        num_same = sum((Counter(prediction_tokens) & Counter(truth_tokens)).values())
        if num_same == 0:
            return 0
        precision = 1.0 * num_same / len(prediction_tokens)
        recall = 1.0 * num_same / len(truth_tokens)
        return (2 * precision * recall) / (precision + recall)

    f1 = exact_match = total = 0.0
    for article in articles:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                total += 1
                if qa["id"] not in predictions:
                    continue
                prediction = predictions[qa["id"]]
                truths = [answer["text"] for answer in qa["answers"]]
                exact_match += max(normalize(prediction) == normalize(truth) for truth in truths)
                f1 += max(f1_score(prediction, truth) for truth in truths)
    return {"exact_match": 100.0 * exact_match / total, "f1": 100.0 * f1 / total}


def evaluate_v2(articles: Articles, predictions: dict[str, str]) -> dict[str, float]:
    """Keys exact, f1, total, and the same after HasAns_ and NoAns_, where there are such questions."""

    def get_tokens(text: str) -> list[str]:
        return normalize(text).split() if text else []

    def compute_f1(gold: str, prediction: str) -> float:
        gold_tokens, prediction_tokens = get_tokens(gold), get_tokens(prediction)
        num_same = sum((Counter(gold_tokens) & Counter(prediction_tokens)).values())
        if len(gold_tokens) == 0 or len(prediction_tokens) == 0:
            return int(gold_tokens == prediction_tokens)
        if num_same == 0:
            return 0
        precision = 1.0 * num_same / len(prediction_tokens)
        recall = 1.0 * num_same / len(gold_tokens)
        return (2 * precision * recall) / (precision + recall)

    exact_scores: dict[str, float] = {}
    f1_scores: dict[str, float] = {}
    has_answer: dict[str, bool] = {}
    for article in articles:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                has_answer[qa["id"]] = bool(qa["answers"])
                gold_answers = [answer["text"] for answer in qa["answers"] if normalize(answer["text"])]
                if not gold_answers:
                    gold_answers = [""]
                if qa["id"] not in predictions:
                    continue
                prediction = predictions[qa["id"]]
                exact_scores[qa["id"]] = max(int(normalize(gold) == normalize(prediction)) for gold in gold_answers)
                f1_scores[qa["id"]] = max(compute_f1(gold, prediction) for gold in gold_answers)

    def make_eval_dict(ids: list[str]) -> dict[str, float]:
        return {
            "exact": 100.0 * sum(exact_scores[qid] for qid in ids) / len(ids),
            "f1": 100.0 * sum(f1_scores[qid] for qid in ids) / len(ids),
            "total": len(ids),
        }

    result = make_eval_dict(list(exact_scores))
    for name, wanted in (("HasAns", True), ("NoAns", False)):
        ids = [qid for qid, answered in has_answer.items() if answered == wanted]
        if ids:
            result |= {f"{name}_{key}": value for key, value in make_eval_dict(ids).items()}
    return result
