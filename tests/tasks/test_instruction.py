"""Instruction tuning: which tokens are learned, that packed rows keep apart, and what the model then says."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedTokenizerFast,
)

from adalora import tasks
from adalora.data import DataError, read_rows
from adalora.recipe import RecipeError
from adalora.tasks import Columns, Setup, Task
from adalora.tasks.chat import Chat, conversations
from adalora.tasks.instruction import InstructionOptions
from adalora.tasks.packing import pack

from ..cli.conftest import run_command

QUESTIONS = {
    "sum of two and two": "four",
    "sum of one and two": "three",
    "colour of snow": "white",
    "opposite of no": "yes",
}
VOCABULARY = "be short what is the and why how long it a sum of two one four three colour snow white opposite no yes"
WORDS = VOCABULARY.split()
SPECIAL = ["<pad>", "<eos>", "<end>", "<system>", "<user>", "<assistant>", "<tool>"]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
MARKED = (
    "{% for message in messages %}<{{ message['role'] }}> "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }} <end>{% endgeneration %} "
    "{% else %}{{ message['content'] }} <end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
FORGETFUL = TEMPLATE.replace("message['content'] }}", "message['content'] if loop.last else 'why' }}")
"""Writes a message in another way when more follow, as templates do that drop earlier reasoning."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Knows words, and has no chat template."""
    words = Tokenizer(WordLevel({word: index for index, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", extra_special_tokens=SPECIAL[2:]
    )


def tiny(config: type[Any] = LlamaConfig, **settings: Any) -> Any:
    """A random language model of two layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    more = {"intermediate_size": 64, "max_position_embeddings": 128, "initializer_range": 0.3, "attn_pdrop": 0.0}
    return AutoModelForCausalLM.from_config(
        config(**sizes | more | {"embd_pdrop": 0.0, "resid_pdrop": 0.0}), **settings
    )


def instruction(max_length: int = 64, columns: Columns | None = None, **options: Any) -> Task:
    columns = columns or tasks.get("instruction").columns
    return tasks.get("instruction")(Setup(columns, None, max_length, InstructionOptions(**options)))


def said(*turns: str) -> list[dict[str, str]]:
    """Messages from texts such as ``user: why``."""
    return [dict(zip(("role", "content"), turn.split(": "), strict=True)) for turn in turns]


def shown(task: Task, rows: Dataset, tokenizer: Any) -> list[str]:
    """Each row as text, with what is learned in brackets."""
    found = []
    for row in task.features(rows, tokenizer, tiny()):
        words = tokenizer.convert_ids_to_tokens(row["input_ids"])
        pairs = zip(words, row["labels"], row["input_ids"], strict=True)
        assert all(label in {-100, token} for _, label, token in pairs)
        marks = [word if label == -100 else f"[{word}]" for word, label in zip(words, row["labels"], strict=True)]
        found.append(" ".join(marks))
    return found


def chats(*rows: list[dict[str, str]]) -> Dataset:
    return Dataset.from_dict({"messages": list(rows)})


TWO_TURNS = said("system: be short", "user: why", "assistant: it is", "user: how long", "assistant: two")


# --- which tokens are learned -----------------------------------------------------------------------


def test_the_answers_of_every_turn_are_learned_and_nothing_else(tokenizer: Any) -> None:
    head = "<system> be short <end> <user> why <end> <assistant>"
    expected = f"{head} [it] [is] [<end>] <user> how long <end> <assistant> [two] [<end>]"
    for template in (TEMPLATE, MARKED):
        assert shown(instruction(chat_template=template), chats(TWO_TURNS), tokenizer) == [expected]


def test_tools_speak_between_answers(tokenizer: Any) -> None:
    row = said("user: sum of one", "assistant: why", "tool: one", "assistant: yes")
    expected = "<user> sum of one <end> <assistant> [why] [<end>] <tool> one <end> <assistant> [yes] [<end>]"
    assert shown(instruction(chat_template=TEMPLATE), chats(row), tokenizer) == [expected]


def test_answers_within_a_prompt_are_not_learned(tokenizer: Any) -> None:
    prompt, completion = TWO_TURNS[1:4], TWO_TURNS[4:]
    rows = Dataset.from_dict({"prompt": [prompt], "completion": [completion]})
    expected = "<user> why <end> <assistant> it is <end> <user> how long <end> <assistant> [two] [<end>]"
    for template in (TEMPLATE, MARKED):
        assert shown(instruction(chat_template=template), rows, tokenizer) == [expected]


def test_texts_become_messages_where_there_is_a_template(tokenizer: Any) -> None:
    rows = Dataset.from_dict({"ask": ["why is it"], "say": ["no"]})
    own = Columns("ask", None, "say")
    expected = ["<user> why is it <end> <assistant> [no] [<end>]"]
    assert shown(instruction(columns=own, chat_template=TEMPLATE), rows, tokenizer) == expected
    assert shown(instruction(columns=own), rows, tokenizer) == ["why is it [no] [<eos>]"]  # joined as they are


def test_where_the_template_comes_from(tokenizer: Any, tmp_path: Path) -> None:
    """The tokenizer's own; a file's; `none`."""
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    rows = Dataset.from_dict({"prompt": ["why "], "completion": ["no"]})
    file = instruction(chat_template=str(tmp_path / "chat.jinja"))
    assert shown(file, rows, tokenizer) == ["<user> why <end> <assistant> [no] [<end>]"]
    with_its_own = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **tokenizer.special_tokens_map)
    with_its_own.chat_template = TEMPLATE
    assert shown(instruction(), rows, with_its_own) == ["<user> why <end> <assistant> [no] [<end>]"]
    assert shown(instruction(chat_template="none"), rows, with_its_own) == ["why [no] [<eos>]"]
    with pytest.raises(RecipeError, match=r"no file chat\.jinja: expected a Jinja template"):
        instruction(chat_template="chat.jinja")


def test_no_token_spans_the_border_of_prompt_and_completion() -> None:
    """A byte-level tokenizer would join the space that ends a prompt with the word that begins the completion."""
    merges = [("Ġ", "y"), ("Ġy", "e"), ("Ġye", "s")]
    vocabulary = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    pieces = Tokenizer(models.BPE({piece: index for index, piece in enumerate(vocabulary)}, merges))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<eos>", pad_token="<eos>")
    rows = Dataset.from_dict({"prompt": ["no ", "no"], "completion": ["yes", " yes"]})
    assert len(tokenizer("no yes")["input_ids"]) == 3
    assert shown(instruction(), rows, tokenizer) == ["n o Ġ [y] [e] [s] [<eos>]", "n o [Ġyes] [<eos>]"]


def test_messages_need_a_template_that_shows_its_answers(tokenizer: Any) -> None:
    model = tiny()
    with pytest.raises(DataError, match=r"row 1: messages need a chat template, .* give one as options\.chat_template"):
        instruction().features(chats(TWO_TURNS), tokenizer, model)
    forgetful = instruction(chat_template=FORGETFUL)
    rows = chats(said("user: how long", "assistant: no"), TWO_TURNS)
    with pytest.raises(DataError, match=r"row 1: the chat template writes the first 1 messages in another way"):
        forgetful.features(rows, tokenizer, model)
    broken = instruction(chat_template="{% if messages %}{{ raise_exception('no system here') }}{% endif %}")
    with pytest.raises(DataError, match="row 1: the chat template cannot write these messages: no system here"):
        broken.features(rows, tokenizer, model)


# --- rows that are too long -------------------------------------------------------------------------


def test_the_oldest_turns_of_a_long_row_are_left_out(tokenizer: Any) -> None:
    expected = "<system> be short <end> <user> how long <end> <assistant> [two] [<end>]"
    pair = Dataset.from_dict({"prompt": [TWO_TURNS[:4]], "completion": [TWO_TURNS[4:]]})
    for template in (TEMPLATE, MARKED):
        task = instruction(max_length=14, chat_template=template)
        assert shown(task, chats(TWO_TURNS), tokenizer) == shown(task, pair, tokenizer) == [expected]


def test_the_end_of_a_long_turn_is_cut_and_rows_without_an_answer_are_left_out(tokenizer: Any) -> None:
    rows = chats(said("user: why", "assistant: it is what it is"), said("user: how long is it", "assistant: two"))
    task = instruction(max_length=6, chat_template=TEMPLATE)
    with pytest.warns(UserWarning, match="1 of 2 rows have no token of an answer in their first 6 .*left out"):
        found = task.features(rows, tokenizer, tiny())
    assert tokenizer.decode(found[0]["input_ids"]) == "<user> why <end> <assistant> it is"
    assert task.predict(tiny(), tokenizer, rows, 2)[1]["tokens"] == 0
    with pytest.raises(DataError, match=r"2 of 2 rows .* raise it"):
        instruction(max_length=4, chat_template=TEMPLATE).features(rows, tokenizer, tiny())


# --- packing ----------------------------------------------------------------------------------------


def conversations_of_many_lengths(count: int) -> Dataset:
    draw = random.Random(0)
    words = lambda: " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))  # noqa: E731
    return Dataset.from_dict({"prompt": [words() for _ in range(count)], "completion": [words() for _ in range(count)]})


def test_a_pack_holds_whole_rows_and_little_else() -> None:
    draw = random.Random(0)
    rows = [{"input_ids": [n] * k, "labels": [n] * k} for n, k in enumerate(draw.choices(range(2, 12), k=100))]
    packs = pack(rows, 20)
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert len(packs) <= math.ceil(tokens / 20) * 1.03
    found = []
    for packed in packs:
        assert len(packed["input_ids"]) == len(packed["labels"]) == len(packed["position_ids"]) <= 20
        begins = [at for at, position in enumerate(packed["position_ids"]) if position == 0]
        assert all(packed["labels"][at] == -100 for at in begins)  # the row before does not predict it
        for start, stop in zip(begins, [*begins[1:], len(packed["input_ids"])], strict=True):
            assert packed["position_ids"][start:stop] == list(range(stop - start))
            found.append(packed["input_ids"][start:stop])
    assert sorted(found) == sorted(row["input_ids"] for row in rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [LlamaConfig, GPT2Config])
def test_packing_does_not_change_loss_and_gradient(config: type[Any], attention: str, tokenizer: Any) -> None:
    rows, outcomes = conversations_of_many_lengths(12), []
    for packing in (False, True):
        model = tiny(config, attn_implementation=attention)
        task = instruction(max_length=32, chat_template=TEMPLATE, packing=packing)
        features = task.features(rows, tokenizer, model)
        assert len(features) < 10 if packing else len(features) == 12
        loss = model.train()(**task.collator(tokenizer, model)(list(features))).loss
        loss.backward()
        outcomes.append((loss.item(), [p.grad.norm().item() for p in model.parameters()]))
    assert outcomes[1][0] == pytest.approx(outcomes[0][0], abs=1e-5)
    assert outcomes[1][1] == pytest.approx(outcomes[0][1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("config", [BloomConfig, MambaConfig])
def test_models_that_cannot_keep_rows_apart_refuse_to_pack(config: type[Any], tokenizer: Any) -> None:
    task = instruction(chat_template=TEMPLATE, packing=True)
    with pytest.raises(RecipeError, match=f"would see each other in a model of type {config.model_type}"):
        task.features(conversations_of_many_lengths(2), tokenizer, tiny(config))


# --- another implementation -------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["messages", "prompt and completion", "texts"])
def test_trl_learns_the_same_tokens(form: str, tokenizer: Any, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    if form == "messages":
        rows = chats(TWO_TURNS, said("user: why", "assistant: it is"))
    elif form == "texts":
        rows = Dataset.from_dict({"prompt": ["why is it", "how long"], "completion": [" no", " a sum of one"]})
    else:
        rows = Dataset.from_dict({"prompt": [TWO_TURNS[:4], TWO_TURNS[1:2]], "completion": [TWO_TURNS[4:]] * 2})
    template = "none" if form == "texts" else MARKED
    ours = instruction(chat_template=template).features(rows, tokenizer, tiny())
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **tokenizer.special_tokens_map)
    theirs.chat_template = None if form == "texts" else MARKED
    settings = {"assistant_only_loss": form == "messages", "max_length": 64, "report_to": "none", "use_cpu": True}
    arguments = SFTConfig(output_dir=str(tmp_path), bf16=False, eos_token="<eos>", **settings)
    trainer = SFTTrainer(tiny(), arguments, train_dataset=rows, processing_class=theirs)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    for index, row in enumerate(ours):
        width = len(row["input_ids"])
        assert batch["input_ids"][index, :width].tolist() == row["input_ids"]
        assert batch["labels"][index, :width].tolist() == row["labels"]
        assert (batch["labels"][index, width:] == -100).all()


# --- what the model says ----------------------------------------------------------------------------


def questions() -> Dataset:
    return Dataset.from_dict({"prompt": list(QUESTIONS), "completion": list(QUESTIONS.values())})


def taught(task: Task, tokenizer: Any) -> Any:
    """A model that has learned the answers by heart."""
    model = tiny()
    batch = task.collator(tokenizer, model)(list(task.features(questions(), tokenizer, model)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("template", [TEMPLATE, "none"])
def test_a_taught_model_answers(template: str, tokenizer: Any) -> None:
    """It stops at what closes an answer, `<end>` or the end of the text; padding does not disturb it."""
    task = instruction(chat_template=template, packing=True)
    model = taught(task, tokenizer)
    answers = task.predict(model, tokenizer, questions(), batch_size=3)
    assert [answer["output"] for answer in answers] == list(QUESTIONS.values())
    found = task.metrics(answers, questions())
    assert tuple(found) == task.metric_names
    assert 1 < found["perplexity"] < 1.5 and found["exact_match"] == 1.0 and found["answer_tokens"] == 8
    other = Dataset.from_dict({"prompt": list(QUESTIONS), "completion": ["four ", "no", "no", "no"]})
    assert task.metrics(answers, other)["exact_match"] == 1 / 4
    asked = task.predict(model, tokenizer, task.rows_of(list(QUESTIONS), None), batch_size=3)
    assert asked == [{"output": text} for text in QUESTIONS.values()]


def test_perplexity_counts_tokens_not_rows(tokenizer: Any) -> None:
    """By hand: from the model's own loss on each row alone."""
    model, rows = tiny().eval(), conversations_of_many_lengths(5)
    task = instruction(chat_template=TEMPLATE, exact_match=False)
    total, tokens = 0.0, 0
    for row in task.features(rows, tokenizer, model):
        learned = sum(label != -100 for label in row["labels"])
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        total += model(input_ids=ids, labels=labels).loss.item() * learned
        tokens += learned
    found = task.metrics(task.predict(model, tokenizer, rows, batch_size=2), rows)
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert found["answer_tokens"] == tokens and math.isnan(found["exact_match"])


def test_long_answers_are_not_compared_unless_asked_for(tokenizer: Any) -> None:
    rows = Dataset.from_dict({"prompt": ["why", "how"], "completion": ["no", "it is " * 30]})
    model = tiny().eval()
    for setting, given in (("auto", False), (True, True), (False, False)):
        task = instruction(256, chat_template=TEMPLATE, exact_match=setting, max_new_tokens=2)
        assert all(("output" in answer) == given for answer in task.predict(model, tokenizer, rows, 2))


def test_a_long_prompt_keeps_its_newest_turns_and_room_for_the_answer(tokenizer: Any) -> None:
    """The model has 128 positions, of which the answer takes 8, and twelve turns with the question 12 * 9 + 5."""
    turns = said(*["user: why is it", "assistant: it is"] * 30, "user: how long")
    all_turns, some, one = conversations(chats(turns, turns[-25:], turns[-1:]), Columns("", None, ""), "", False)
    chat = Chat(tokenizer, TEMPLATE)
    assert chat.ask(all_turns, 120) == chat.ask(some, 120) and len(chat.ask(some, 120)) == 113
    assert chat.ask(one, 3) == chat.ask(one, 5)[-3:]
    task = instruction(max_length=512, chat_template=TEMPLATE, max_new_tokens=8)
    assert set(task.predict(tiny(GPT2Config).eval(), tokenizer, chats(turns), batch_size=1)[0]) == {"output"}
    with pytest.raises(RecipeError, match=r"max_new_tokens \(128\) should be below 128"):
        instruction(chat_template=TEMPLATE, max_new_tokens=128).features(chats(TWO_TURNS), tokenizer, tiny())


# --- what cannot be used ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": said("user: why", "bot: no")},
            "message 2 of 'messages' has the role 'bot': expected system, user,",
        ),
        ({"messages": said("user: why", "assistant:  ")}, "the content of message 2 of 'messages' is empty"),
        ({"messages": said("user: why")}, "'messages' ends with the role 'user': expected assistant"),
        ({"messages": said("assistant: no")}, "'messages' begins with the role 'assistant': expected user or system"),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "message 1 of 'messages' should have text as its content, it has 3",
        ),
        ({"messages": [{"content": "why"}]}, "has the role None"),
        ({"messages": ["why"]}, "message 1 of 'messages' is 'why': expected an object with role and content"),
        ({"messages": []}, "'messages' is empty: expected a list of messages"),
        ({"prompt": " ", "completion": "no"}, "'prompt' is empty"),
        ({"prompt": "why", "completion": ""}, "'completion' is empty"),
        ({"prompt": "why", "completion": None}, "'completion' is empty"),
        ({"prompt": "why", "completion": 4}, "'completion' holds 4"),
        ({"prompt": "why", "completion": said("user: no")}, "'completion' ends with the role 'user'"),
    ],
)
def test_rows_that_are_no_conversations(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"messages": TWO_TURNS} if "messages" in row else {"prompt": "why", "completion": "no"}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in (good, row)))
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2: ") as error:
        instruction().check(read_rows(str(file), "train"), str(file))
    assert message in str(error.value)


def test_columns_that_are_missing() -> None:
    rows = Dataset.from_dict({"prompt": ["why"], "reply": ["no"]})
    with pytest.raises(DataError, match="x should have a column 'messages', or 'prompt' and 'completion': its columns"):
        instruction().check(rows, "x")
    instruction().check(rows, "x", with_targets=False)  # a prompt is enough to answer


def test_models_and_settings_that_do_not_fit(tokenizer: Any) -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64}
    bart = BartForConditionalGeneration(BartConfig(encoder_attention_heads=2, decoder_attention_heads=2, **sizes))
    with pytest.raises(RecipeError, match="needs a causal language model"):
        instruction(chat_template=TEMPLATE).features(chats(TWO_TURNS), tokenizer, bart)
    kind = tasks.get("instruction")
    with pytest.raises(RecipeError, match=r"data\.label_names has no meaning"):
        kind(Setup(kind.columns, ["a"], 8, InstructionOptions()))
    with pytest.raises(RecipeError, match=r"data\.text_pair has no meaning"):
        kind(Setup(Columns("prompt", "more", "completion"), None, 8, InstructionOptions()))
    with pytest.raises(DataError, match="single texts"):
        instruction().rows_of(["why"], ["no"])


# --- the command line -------------------------------------------------------------------------------


@pytest.fixture
def model_folder(tokenizer: Any, tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "model")
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **tokenizer.special_tokens_map)
    own.chat_template = TEMPLATE
    own.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_train_evaluate_and_predict(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"messages": said(f"user: {q}", f"assistant: {a}")}) + "\n" for q, a in QUESTIONS.items()]
    Path("chats.jsonl").write_text("".join(lines * 4))
    arguments = [*("--task", "instruction", "--model", model_folder, "--train", "chats.jsonl", "--eval", "chats.jsonl")]
    arguments += ["--epochs", 10, "--batch-size", 2, "--lr", 2e-2, "--output", "run", "--max-length", 32]
    arguments += ["--set", "options.packing=true", "--set", "training.eval_strategy=no", "--set", "method=lora"]
    done = run_command("train", *arguments)
    assert done.code == 0, done.err
    metrics = json.loads(Path("run/metrics.json").read_text())["metrics"]
    assert metrics["perplexity"] < 40 and 0 <= metrics["exact_match"] <= 1 and metrics["answer_tokens"] == 32
    again = run_command("evaluate", "run", "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["metrics"] == pytest.approx(metrics, rel=1e-4)
    answered = run_command("predict", "run", "--text", "colour of snow", "--json")
    assert answered.code == 0 and "text" in answered.out, answered.err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*GGUF")
def test_three_steps_of_a_real_model_with_its_own_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": said("user: What is the capital of France?", "assistant: Paris."), "id": n} for n in range(6)]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Path(__file__).parents[2] / "recipes" / "instruction.yaml"
    arguments = ["--train", "chats.jsonl", "--eval", "chats.jsonl", "--batch-size", 2, "--set", "training.max_steps=3"]
    done = run_command("train", recipe, *arguments, "--output", "run")
    assert done.code == 0, done.err
    found = json.loads(Path("run/metrics.json").read_text())
    assert found["steps"] == 3 and 1 < found["metrics"]["perplexity"] < 30
