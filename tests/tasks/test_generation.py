"""Causal and encoder-decoder models learn texts from texts, and say them again: shift, masks and padding are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from transformers import GenerationConfig

from adalora import tasks
from adalora.data import DataError
from adalora.pretrained import load_model, load_tokenizer
from adalora.recipe import RecipeError
from adalora.tasks import Columns, Setup
from adalora.tasks.generation import IGNORED, Pad

from .generators import END, KINDS, PAD, START, model_of, overfit, task_of, tokenizer_of

ROWS = Dataset.from_dict(
    {
        "text": ["name : Blue Spice | near : the river in the old city centre", "name : Loch Fyne"],
        "target": ["Blue Spice, a pub near the river, isn't cheap.", "Loch Fyne serves food!"],
    }
)
CAUSAL = ("gpt2", "llama")


def parts(kind: str) -> tuple[Any, Any, Any]:
    """A task, an untrained model and its tokenizer."""
    tokenizer = tokenizer_of(kind, [*ROWS["text"], *ROWS["target"]])
    return task_of("data_to_text", num_beams=1), model_of(kind, len(tokenizer)), tokenizer


# ------------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_learns_two_pairs_by_heart(kind: str) -> None:
    """The exact texts, in one batch and one by one, greedily and by beams: nothing is off by a token anywhere."""
    task, model, tokenizer = parts(kind)
    assert overfit(task, model, tokenizer, ROWS, steps=45) < 0.2
    expected = [{"output": text} for text in ROWS["target"]]
    assert task.predict(model, tokenizer, ROWS, batch_size=2) == expected
    assert task.predict(model, tokenizer, ROWS.select([1, 0]), batch_size=1) == expected[::-1]
    beams = task_of("data_to_text", num_beams=3)
    assert beams.predict(model, tokenizer, ROWS.remove_columns("target"), batch_size=2) == expected
    found = beams.metrics(expected, ROWS)
    assert tuple(found) == task.metric_names and found["bleu"] == pytest.approx(100) and found["ter"] == 0


@pytest.mark.parametrize("kind", CAUSAL)
def test_the_loss_of_a_causal_model_is_on_the_target_and_its_end(kind: str) -> None:
    task, model, tokenizer = parts(kind)
    features = task.features(ROWS, tokenizer, model)
    assert set(features.column_names) == {"input_ids", "labels"}
    for row, text, target in zip(features, ROWS["text"], ROWS["target"], strict=True):
        learned = [label for label in row["labels"] if label != IGNORED]
        prompt = row["input_ids"][: -len(learned)]
        assert row["labels"] == [IGNORED] * len(prompt) + row["input_ids"][len(prompt) :]
        assert learned[-1] == END and tokenizer.decode(learned[:-1]) == target
        start = [START] if kind == "llama" else []
        assert prompt == start + tokenizer(f"{text}\n", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_the_labels_of_an_encoder_decoder_are_the_target_and_its_end(kind: str) -> None:
    """The decoder's input is the model's own shift of them, so the batch has none."""
    task, model, tokenizer = parts(kind)
    features = task.features(ROWS, tokenizer, model)
    batch = task.collator(tokenizer, model)(list(features))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"][1].tolist()[len(features[1]["labels"]) :] == [IGNORED] * (batch["labels"] == IGNORED).sum()
    assert [tokenizer.decode(row["labels"], skip_special_tokens=True) for row in features] == list(ROWS["target"])
    assert all(row["labels"][-1] == END and row["input_ids"][-1] == END for row in features)
    shifted = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    whole = model(**batch).loss
    torch.testing.assert_close(model(**batch, decoder_input_ids=shifted).loss, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_too_long_is_cut_and_the_target_stays(kind: str) -> None:
    """The input at ``max_length``, separator included; the target at ``max_target_length``, its end included."""
    _, model, tokenizer = parts(kind)
    rows = Dataset.from_dict({"text": ["river " * 50], "target": ["pub " * 50]})
    task = task_of("data_to_text", max_length=12, max_target_length=8)
    row = task.features(rows, tokenizer, model)[0]
    if kind in CAUSAL:
        separator = tokenizer("\n", add_special_tokens=False)["input_ids"]
        assert row["input_ids"][12 - len(separator) : 12] == separator
        assert row["labels"][:12] == [IGNORED] * 12 and row["labels"][12:] == row["input_ids"][12:]
        assert len(row["labels"]) == 20
    else:
        assert len(row["input_ids"]) == 12 and len(row["labels"]) == 8
    assert row["labels"][-1] == END


def test_the_prefix_and_the_separator_are_where_the_options_say() -> None:
    tokenizer = tokenizer_of("llama", [*ROWS["text"], "tell:"])
    model = model_of("llama", len(tokenizer))
    task = task_of("data_to_text", source_prefix="tell: ", separator=" =>")
    tokens = task.features(ROWS, tokenizer, model)[1]["input_ids"]
    assert tokenizer.decode(tokens) == "<s>tell: name : Loch Fyne =>Loch Fyne serves food!</s>"
    bare = task_of("data_to_text", separator="").features(ROWS, tokenizer, model)[1]["input_ids"]
    assert tokenizer.decode(bare) == "<s>name : Loch FyneLoch Fyne serves food!</s>"


def test_a_causal_prompt_does_not_end_with_what_ends_a_text() -> None:
    """Some tokenizers put it at the end of whatever they read."""
    tokenizer = tokenizer_of("t5", ROWS["text"])
    tokens = task_of("data_to_text").features(ROWS, tokenizer, model_of("gpt2", len(tokenizer)))[0]["input_ids"]
    assert tokens.index(END) == len(tokens) - 1


def test_a_row_is_learned_from_once_for_each_reference() -> None:
    task, model, tokenizer = parts("gpt2")
    rows = Dataset.from_dict({"text": ["a", "b"], "target": [["x", "y", " "], ["z"]]})
    features = task.features(rows, tokenizer, model)
    assert [tokenizer.decode(row["input_ids"]) for row in features] == ["a\nx</s>", "a\ny</s>", "b\nz</s>"]


# ------------------------------------------------------------------------------------------------ answering


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_change_an_answer(kind: str) -> None:
    """Whatever stands beside a row in its batch: of a model that has half learned, and is sure of nothing."""
    _, model, tokenizer = parts(kind)
    task = task_of("data_to_text", num_beams=1, min_target_length=8, max_target_length=8)
    overfit(task, model, tokenizer, ROWS, steps=20)
    rows = Dataset.from_dict({"text": ["near", "name : Blue Spice | near : the river", "the old city", "Fyne"]})
    assert len(rows[1]["text"]) > 4 * len(rows[0]["text"])
    alone = [task.predict(model, tokenizer, rows.select([index]), 1)[0] for index in range(len(rows))]
    assert task.predict(model, tokenizer, rows, batch_size=4) == alone
    assert len({answer["output"] for answer in alone}) > 1


def test_each_input_is_answered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    task, model, tokenizer = parts("gpt2")
    sizes: list[int] = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **batch: (sizes.append(len(batch["input_ids"])), generate(**batch))[1]
    )
    rows = Dataset.from_dict({"text": ["a", "b", "a", "c", "b", "a"]})
    answers = task.predict(model, tokenizer, rows, batch_size=2)
    assert sizes == [2, 1]
    assert answers[0] == answers[2] == answers[5] and answers[1] == answers[4]
    assert task.predict(model, tokenizer, rows.select([]), batch_size=2) == []


def test_answering_leaves_random_numbers_and_the_model_as_they_were() -> None:
    """A model in training, which says of itself to sample, is put back as it was and did not sample."""
    task, model, tokenizer = parts("llama")
    own = GenerationConfig(do_sample=True, temperature=0.7, top_k=3, max_length=7, eos_token_id=END, pad_token_id=PAD)
    model.generation_config = own
    model.train()
    before = torch.get_rng_state()
    first = task.predict(model, tokenizer, ROWS, 2)
    assert torch.equal(before, torch.get_rng_state())
    assert first == task.predict(model, tokenizer, ROWS, 2)
    assert model.training and model.generation_config is own and own.do_sample
    assert len(tokenizer(first[0]["output"])["input_ids"]) > 7  # the recipe's length, not the model's


@pytest.mark.parametrize("kind", ["bart", "llama"])
def test_a_wrapped_model_answers_with_its_adapter(kind: str) -> None:
    """PEFT's wrapper generates as the model inside does."""
    task, model, tokenizer = parts(kind)
    overfit(task, model, tokenizer, ROWS, steps=45)
    form = "CAUSAL_LM" if kind in CAUSAL else "SEQ_2_SEQ_LM"
    config = LoraConfig(r=2, target_modules="all-linear", task_type=form, init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    with_adapter = task.predict(wrapped, tokenizer, ROWS, 2)
    with wrapped.disable_adapter():
        without = task.predict(wrapped, tokenizer, ROWS, 2)
    assert [answer["output"] for answer in without] == list(ROWS["target"])
    assert with_adapter != without


def test_options_of_the_search_reach_it() -> None:
    _, model, tokenizer = parts("gpt2")
    says = model.transformer.ln_f
    torch.nn.init.zeros_(says.weight)
    says.bias.data = 10 * model.lm_head.weight[tokenizer(" river")["input_ids"][0]].detach()  # whatever it reads

    def answer(**options: Any) -> str:
        return task_of("data_to_text", **options).predict(model, tokenizer, ROWS.select([1]), 1)[0]["output"]

    assert (
        answer(num_beams=1, max_target_length=9) == answer(num_beams=2, max_target_length=9) == "river" + 8 * " river"
    )
    assert answer(num_beams=1, max_target_length=9, no_repeat_ngram_size=1).count("river") == 1
    assert answer(num_beams=1, max_target_length=9, no_repeat_ngram_size=3).count("river river river") == 1
    says.bias.data = 10 * model.lm_head.weight[END].detach()
    assert answer(num_beams=1) == "" != answer(num_beams=1, min_target_length=3)


# ------------------------------------------------------------------------------------------------ padding and refusals


def test_padding() -> None:
    rows = [{"input_ids": [5, 6], "labels": [7]}, {"input_ids": [8], "labels": [9, 9]}]
    left = Pad(PAD, "left")(rows)
    assert left["input_ids"].tolist() == [[5, 6], [0, 8]] and left["attention_mask"].tolist() == [[1, 1], [0, 1]]
    right = Pad(PAD, "right")(rows)
    assert right["input_ids"].tolist() == [[5, 6], [8, 0]] and right["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert right["labels"].tolist() == [[7, IGNORED], [9, 9]]
    assert "labels" not in Pad(PAD, "left")([{"input_ids": [1]}])


def test_lengths_that_the_model_has_no_room_for() -> None:
    """A causal model reads input and target in one; an encoder-decoder each on its own. T5 has no limit."""
    for kind, options, message in [
        ("gpt2", {"max_length": 100}, r"data.max_length \(100\) \+ options.max_target_length \(40\) should be 128"),
        ("bart", {"max_length": 100, "max_target_length": 200}, "options.max_target_length should be 128 at most"),
        ("llama", {"max_length": 4, "separator": "12345"}, "leaves no room beside options.separator"),
    ]:
        _, model, tokenizer = parts(kind)
        task = task_of("data_to_text", **options)
        with pytest.raises(RecipeError, match=message):
            task.features(ROWS, tokenizer, model)
        with pytest.raises(RecipeError, match=message):
            task.predict(model, tokenizer, ROWS, 2)
    for kind in ("bart", "t5"):
        _, model, tokenizer = parts(kind)
        assert len(task_of("data_to_text", max_length=100, max_target_length=100).features(ROWS, tokenizer, model)) == 2


def test_a_tokenizer_without_an_end() -> None:
    task, model, tokenizer = parts("gpt2")
    tokenizer.eos_token = None
    with pytest.raises(RecipeError, match="no end-of-text token"):
        task.features(ROWS, tokenizer, model)


def test_settings_without_a_meaning() -> None:
    kind = tasks.get("data_to_text")
    with pytest.raises(RecipeError, match=r"data.label_names has no meaning"):
        kind(Setup(kind.columns, ["a", "b"], 32, kind.options()))
    with pytest.raises(RecipeError, match=r"data.text_pair has no meaning"):
        kind(Setup(Columns("text", "more", "target"), None, 32, kind.options()))
    with pytest.raises(ValidationError, match=r"min_target_length \(9\) is above max_target_length \(8\)"):
        kind.options(min_target_length=9, max_target_length=8)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("text", ["a", " "], "column 'text' of here has no text in row 2"),
        ("text", [1, 2], "row 1 of here, columns 'text' and 'target': expected a text, found 1"),
        ("target", ["a", ""], "column 'target' of here has no text in row 2"),
        ("target", [["a"], [None, " "]], "column 'target' of here has no text in row 2"),
        ("target", [1, 2], "row 1 of here, .*: expected a text or a list of texts as references, found 1"),
        ("target", ["a", None], "column 'target' of here is empty in 1 of 2 rows"),
    ],
)
def test_rows_that_cannot_be_read(column: str, values: list[Any], message: str) -> None:
    rows = Dataset.from_dict({"text": ["a", "b"], "target": ["c", "d"]} | {column: values})
    with pytest.raises(DataError, match=message):
        task_of("data_to_text").check(rows, "here")
    if column == "target":
        task_of("data_to_text").check(rows, "here", with_targets=False)


@pytest.mark.parametrize("name", ["AutoModel", "AutoModelForMaskedLM"])
def test_an_encoder_is_no_language_model(pieces: Path, tmp_path: Path, name: str) -> None:
    """With the output layer of a masked language model it would see the words that it should find."""
    tokenizer = load_tokenizer(str(pieces))
    getattr(transformers, name).from_pretrained(pieces).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"cannot learn to write: bert is an encoder, .* encoder-decoder"):
        load_model(str(tmp_path), task_of("summarization"), tokenizer)


def test_an_encoder_that_was_made_a_decoder_is_a_language_model(pieces: Path, tmp_path: Path) -> None:
    config = transformers.BertConfig.from_pretrained(pieces, is_decoder=True)
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), task_of("summarization"), load_tokenizer(str(pieces)))


def test_a_body_alone_is_no_language_model(tmp_path: Path) -> None:
    """Transformers would give it an output layer of random numbers, and train that."""
    tokenizer = tokenizer_of("llama", list(ROWS["text"]))
    model_of("llama", len(tokenizer)).base_model.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="no output layer that was trained to write"):
        load_model(str(tmp_path), task_of("summarization"), tokenizer)
