"""A model's chat template, rendered as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import ChatTemplateError, ModelError, quoted
from shared.models.folder import ModelFolder

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

RESERVED = frozenset(
    {
        *_NAMED_TOKENS,
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "raise_exception",
        "strftime_now",
        "namespace",
        "range",
        "dict",
        "lipsum",
        "cycler",
        "joiner",
    }
)
"""Names that templates get from here or from Jinja."""


class ChatTemplate:
    """Renders conversations with the Jinja template of a model folder, in a sandbox.

    Raises ModelError if the template can't be compiled.
    """

    def __init__(self, folder: ModelFolder) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._path = folder.path
        self._environment = environment
        chat = folder.chat_template or ""
        self.source = folder.tool_template or chat
        """Text of the template for conversations with tools."""
        self._template = self._compiled(chat)
        self._tool_template = self._compiled(self.source)
        self.thinks = any(tag in text for tag in ("<think>", "</think>") for text in (self.source, chat))
        """True if the template has the tags of reasoning, so that the model's answers may have them too."""
        variables = jinja2.meta.find_undeclared_variables
        self.variables = frozenset(variables(environment.parse(chat)) | variables(environment.parse(self.source)))
        self.variables -= RESERVED
        """Names of the template's own variables, beside those that every template gets."""
        self.takes_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(self.source))
        """True if the template shows a conversation's tools to the model."""
        self._tokens = {name: token for name in _NAMED_TOKENS if (token := folder.special_token(name)) is not None}

    def _compiled(self, source: str) -> jinja2.Template:
        try:
            return self._environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(
                f"{self._path}: the chat template can't be compiled ({error}). Correct chat_template.jinja or "
                "chat_template in tokenizer_config.json."
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the conversation as text. tools: OpenAI's descriptions of the tools that the model may call.
        variables: values of the template's own variables.

        Raises ChatTemplateError if it is empty, the template refuses it, or it has no such variable.
        """
        if not messages:
            raise ChatTemplateError("messages is empty: send at least one message.")
        if unknown := sorted((variables or {}).keys() - self.variables):
            known = f"it has {', '.join(sorted(self.variables))}" if self.variables else "it has none of its own"
            raise ChatTemplateError(f"the model's chat template has no variable {quoted(unknown[0])}; {known}.")
        conversation = [
            {**message, "content": _text(message["content"], index)} if "content" in message else message
            for index, message in enumerate(messages)
        ]
        try:
            with_tools = tools or any(each.get("tool_calls") or each.get("role") == "tool" for each in messages)
            return (self._tool_template if with_tools else self._template).render(
                messages=conversation,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
                **(variables or {}),
            )
        except Exception as error:  # the template is the model's code: it can raise anything
            raise ChatTemplateError(
                f"the model's chat template refuses these messages: {error}. "
                "Check the roles, their order, and that each message has content."
            ) from error


def _text(content: Any, index: int) -> Any:
    """Return the content as one string, with a line for each text part."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise ChatTemplateError(
                f"messages[{index}] has a part of type {quoted(kind)}: "
                'send parts {"type": "text", "text": "..."} only.'
            )
    return "\n".join(part["text"] for part in content)


class _Generation(Extension):
    """The block `{% generation %}`, which marks answers for training and has no effect here."""

    tags = {"generation"}  # noqa: RUF012 Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
