"""Chat templates of instruct models: a record is the user's turn, an answer the assistant's.

`tokenizer.apply_chat_template` renders a text, with `add_generation_prompt` on and `enable_thinking` off. The answer's
tokens follow, with the white space that the template sets before an answer.
"""

import hashlib
from collections.abc import Collection
from typing import Any

from jinja2.exceptions import TemplateError

from ficpd.errors import BackboneError

PARTS = {"%d": "26", "%m": "07", "%b": "Jul", "%B": "July", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri"}
DAY = (
    "{% macro strftime_now(f) %}{{ f"
    + "".join(f".replace('{k}', '{v}')" for k, v in PARTS.items())
    + " }}{% endmacro %}"
)
"""Replaces today's date by a fixed one (Llama 3's default), so that a text has the same tokens every day."""
USER, ANSWER = "QUESTION-1", "ANSWER-1"
"""Texts to find in a template's output."""


class Chat:
    """A tokenizer's template.

    opening: the text from the user's words to the answer.
    blank: the white space before an answer.
    end: the token behind an answer.
    """

    def __init__(self, tokenizer: Any, system: str | None, name: str):
        """Raises `BackboneError` for a template that cannot be rendered, for example because it has no system text."""
        self.tokenizer, self.system, self.name = tokenizer, system, name
        own = tokenizer.get_chat_template()
        self.template = DAY + own if "strftime_now" in own else own
        asked, whole = self.render(USER), self._render(USER, ANSWER)
        before, found, after = whole.rpartition(ANSWER)
        if USER not in asked or not found:
            raise BackboneError(
                f"backbone.options.chat_template: the template of {name!r} leaves texts out; expected the user's and the "
                "assistant's. Set chat_template = false."
            )
        lead = before.removeprefix(asked)
        self.opening, self.blank = (
            asked.rpartition(USER)[2],
            lead if before.startswith(asked) and lead.isspace() else "",
        )
        special = tokenizer.added_tokens_decoder
        self.end = next((i for i in tokenizer(after, add_special_tokens=False)["input_ids"] if i in special), None)

    def render(self, user: str) -> str:
        """Returns the text up to the assistant's answer."""
        return self._render(user, None)

    def _render(self, user: str, answer: str | None) -> str:
        turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns.append({"role": "user", "content": user})
        turns += [] if answer is None else [{"role": "assistant", "content": answer}]
        try:
            return self.tokenizer.apply_chat_template(
                turns,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=answer is None,
                enable_thinking=False,
            )
        except (TemplateError, ValueError, TypeError) as error:
            system = "" if self.system is None else f" with the system text {self.system!r}"
            raise BackboneError(
                f"backbone.options.chat_template: the template of {self.name!r} cannot be used{system} ({error}). Leave "
                "backbone.options.system out, or set chat_template = false."
            ) from error

    def identity(self) -> str:
        """Returns a short hash of template and system text, for the fingerprint."""
        return hashlib.sha256(self._render(USER, ANSWER).encode()).hexdigest()[:8]


def choose_chat(
    wanted: bool | str, system: str | None, tokenizer: Any, ends: Collection[int], name: str
) -> Chat | None:
    """Returns the template to use, or None. "auto": only if the template ends answers by an end token of the model.

    A base model may have the tokenizer of its instruct model, but it ends its texts by another token.
    """
    if wanted is False or (tokenizer.chat_template is None and wanted == "auto" and system is None):
        if system is not None:
            raise BackboneError(
                "backbone.options.system: expected chat_template = true or auto with it. Leave the system text out."
            )
        return None
    if tokenizer.chat_template is None:
        raise BackboneError(
            f"backbone.options.chat_template: the tokenizer of {name!r} has no chat template. Use an instruct model, or "
            "leave chat_template and system out."
        )
    if wanted is True or system is not None:
        return Chat(tokenizer, system, name)
    try:
        chat = Chat(tokenizer, None, name)
    except BackboneError:  # no setting asks for it
        return None
    return chat if chat.end in ends else None
