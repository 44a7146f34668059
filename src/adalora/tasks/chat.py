"""Conversations: rows of messages, or of a prompt and its completion, as tokens of which some belong to answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from datasets import Dataset
from jinja2 import TemplateError

from ..data import DataError
from .base import Columns

ROLES = ("system", "user", "assistant", "tool")
MESSAGES = "messages"
"""The column of whole conversations where the recipe names none."""

Message = dict[str, Any]


class Conversation(NamedTuple):
    """What is said, in order. The answers are the assistant's messages from ``context`` on."""

    messages: list[Message]
    context: int  # so many messages are given, answers among them included
    strings: bool  # prompt and completion were texts, not lists of messages

    @property
    def answer(self) -> str | None:
        """The last answer's text; None where one is asked for."""
        last = self.messages[-1]
        return last.get("content", "") if last["role"] == "assistant" else None

    @property
    def question(self) -> Conversation:
        """All that comes before the last answer."""
        return self if self.answer is None else self._replace(messages=self.messages[:-1])

    def without_oldest_turn(self) -> Conversation | None:
        """Without what is said between the system's messages and the second of the user's; None with only one."""
        roles = [message["role"] for message in self.messages]
        system = next((k for k, role in enumerate(roles) if role != "system"), len(roles))
        if "user" not in roles[system + 1 :]:
            return None
        second = roles.index("user", system + 1)
        left = self.messages[:system] + self.messages[second:]
        return self._replace(messages=left, context=max(system, self.context - (second - system)))


class Encoded(NamedTuple):
    """A conversation as the model reads it."""

    tokens: list[int]
    learned: list[bool]  # of each token, whether it belongs to an answer


# --- from rows to conversations ---------------------------------------------------------------------


def conversations(rows: Dataset, columns: Columns, source: str, with_targets: bool) -> list[Conversation]:
    """The conversation of each row: prompt and completion where both columns are there, else messages.

    Raises:
        DataError: a column is missing; or naming the row, whose roles or texts are not as they should be, or which
            ends without an answer though there should be one (``with_targets``).
    """
    text, label = _columns(rows, columns, source, with_targets)
    found = []
    for number, row in enumerate(rows.select_columns([text] if label is None else [text, label]), start=1):
        try:
            found.append(_conversation(row, text, label, with_targets))
        except DataError as error:
            raise DataError(f"{source}, row {number}: {error}") from error
    return found


def _columns(rows: Dataset, columns: Columns, source: str, with_targets: bool) -> tuple[str, str | None]:
    """The column of prompts and that of completions; or that of whole conversations, or of mere prompts, and None."""
    names = rows.column_names
    if columns.text in names and columns.label in names:
        return columns.text, columns.label
    if columns.text in names and getattr(rows.features[columns.text], "dtype", "") not in {"string", "large_string"}:
        return columns.text, None
    if MESSAGES in names:
        return MESSAGES, None
    if columns.text in names and not with_targets:
        return columns.text, None
    raise DataError(
        f"{source} should have a column {MESSAGES!r}, or {columns.text!r} and {columns.label!r}: "
        f"its columns are {', '.join(names)}"
    )


def _conversation(row: Mapping[str, Any], text: str, label: str | None, with_targets: bool) -> Conversation:
    given = _messages(row[text], text, "user")
    if given[0]["role"] not in {"system", "user"}:
        raise DataError(f"{text!r} begins with the role {given[0]['role']!r}: expected user or system")
    strings = isinstance(row[text], str)
    if label is None or (row[label] is None and not with_targets):
        found = Conversation(given, 0, strings)
    else:
        strings = strings and isinstance(row[label], str)
        found = Conversation(given + _messages(row[label], label, "assistant"), len(given), strings)
    if with_targets and found.answer is None:
        raise DataError(f"{label or text!r} ends with the role {found.messages[-1]['role']!r}: expected assistant")
    return found


def _messages(value: Any, column: str, role: str) -> list[Message]:
    """The messages that a column holds: a text is one, by ``role``."""
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{column!r} is empty")
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        kind = "is empty" if value is None or value == [] else f"holds {value!r}"
        raise DataError(f"{column!r} {kind}: expected a list of messages with role and content, or text")
    return [_message(message, f"message {number} of {column!r}") for number, message in enumerate(value, start=1)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is {value!r}: expected an object with role and content")
    message = {key: part for key, part in value.items() if part is not None}  # columns of structures fill in None
    role, content = message.get("role"), message.get("content", "")
    if role not in ROLES:
        raise DataError(f"{where} has the role {role!r}: expected {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    if not isinstance(content, str):
        raise DataError(f"{where} should have text as its content, it has {content!r}")
    if not content.strip() and not (role == "assistant" and message.get("tool_calls")):
        raise DataError(f"the content of {where} is empty")
    return message


# --- from conversations to tokens -------------------------------------------------------------------


class Chat:
    """How a tokenizer writes conversations: by a chat template; without one, prompt and completion as they are."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._marks_answers = template is not None and re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None

    def encode(self, conversation: Conversation, max_length: int) -> Encoded:
        """Tokens of a conversation that ends with an answer, and which of them to learn.

        Where it is too long, the oldest turns are left out, not the system's messages; where the last turn alone is
        too long, its end is cut, and perhaps no answer is left. DataError when the template cannot write it, or does
        not show where answers begin and end.
        """
        encoded = self._encode(conversation)
        if len(encoded.tokens) > max_length and self._template is not None:
            encoded = self._encode(self._shortened(conversation, max_length, asking=False))
        return Encoded(encoded.tokens[:max_length], encoded.learned[:max_length])

    def ask(self, conversation: Conversation, max_length: int) -> list[int]:
        """Tokens of a conversation up to where the assistant speaks next; what is too long is cut at the start."""
        if self._template is None:
            tokens = self._read(self._joined(conversation))
        else:
            tokens = self._write(self._shortened(conversation, max_length, asking=True).messages, asking=True)
        return tokens[-max_length:]

    def ends(self) -> list[int]:
        """Tokens that end an answer: the end of a text, and the special token that the template closes answers with."""
        end = self._tokenizer.eos_token_id
        ends = set() if end is None else {end}
        if self._template is not None:
            question = [{"role": "user", "content": "a"}]
            written = self._write([*question, {"role": "assistant", "content": "b"}])
            answer = written[len(self._write(question, asking=True)) :]
            added = self._tokenizer.added_tokens_decoder
            ends.update([token for token in answer if token in added and added[token].special][-1:])
        return sorted(ends)

    def _encode(self, conversation: Conversation) -> Encoded:
        if self._template is None:
            return self._encode_joined(conversation)
        return self._encode_marked(conversation) if self._marks_answers else self._encode_by_prefixes(conversation)

    def _encode_joined(self, conversation: Conversation) -> Encoded:
        """Prompt, completion and end of text. No token spans the border between the first two, as when answering."""
        prompt = self._read(self._joined(conversation.question))
        end = self._tokenizer.eos_token or ""
        answer = (conversation.answer or "").removesuffix(end) + end
        tokens = self._read(self._joined(conversation.question) + answer)
        if tokens[: len(prompt)] != prompt:
            tokens = prompt + self._read(answer, add_special_tokens=False)
        return Encoded(tokens, [index >= len(prompt) for index in range(len(tokens))])

    def _encode_marked(self, conversation: Conversation) -> Encoded:
        """Answers are what the template writes between ``{% generation %}`` and ``{% endgeneration %}``."""
        context = conversation.messages[: conversation.context]
        written = self._apply(conversation.messages, return_assistant_tokens_mask=True)
        learned = [bool(mark) for mark in written["assistant_masks"]]
        if any(message["role"] == "assistant" for message in context):
            start = self._prefix(written["input_ids"], context, asking=True)
            learned[:start] = [False] * start
        return Encoded(written["input_ids"], learned)

    def _encode_by_prefixes(self, conversation: Conversation) -> Encoded:
        """An answer reaches from where the template asks for it to where it goes on with the next message."""
        messages = conversation.messages
        whole = self._write(messages)
        learned = [False] * len(whole)
        for index in range(conversation.context, len(messages)):
            if messages[index]["role"] == "assistant":
                start = self._prefix(whole, messages[:index], asking=True)
                stop = len(whole) if messages[index + 1 :] == [] else self._prefix(whole, messages[: index + 1])
                learned[start:stop] = [True] * (stop - start)
        return Encoded(whole, learned)

    def _prefix(self, whole: list[int], messages: Sequence[Message], asking: bool = False) -> int:
        """Number of tokens of the first messages; DataError unless ``whole`` begins with these very tokens."""
        tokens = self._write(messages, asking)
        if whole[: len(tokens)] != tokens:
            raise DataError(
                f"the chat template writes the first {len(messages)} messages in another way when more follow, so that "
                "answers cannot be told from the rest: give one that marks them with {% generation %} "
                "(options.chat_template)"
            )
        return len(tokens)

    def _shortened(self, conversation: Conversation, max_length: int, asking: bool) -> Conversation:
        """Without its oldest turns, as many as it takes and as there are before the last."""
        while len(self._write(conversation.messages, asking)) > max_length:
            shorter = conversation.without_oldest_turn()
            if shorter is None:
                break
            conversation = shorter
        return conversation

    def _joined(self, question: Conversation) -> str:
        if not question.strings:
            raise DataError(
                "messages need a chat template, and the tokenizer has none: give one as options.chat_template, "
                "a Jinja template or the path of a file that holds it"
            )
        return str(question.messages[0]["content"])

    def _read(self, text: str, **settings: Any) -> list[int]:
        return list(self._tokenizer(text, verbose=False, **settings)["input_ids"])

    def _write(self, messages: Sequence[Message], asking: bool = False) -> list[int]:
        return list(self._apply(messages, add_generation_prompt=asking)["input_ids"])

    def _apply(self, messages: Sequence[Message], **settings: Any) -> Mapping[str, Any]:
        try:
            written: Mapping[str, Any] = self._tokenizer.apply_chat_template(
                list(messages), chat_template=self._template, tokenizer_kwargs={"verbose": False}, **settings
            )
        except (TemplateError, TypeError) as error:
            raise DataError(f"the chat template cannot write these messages: {error}") from error
        return written
