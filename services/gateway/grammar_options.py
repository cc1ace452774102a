"""Options that set the grammar of the answers: `response_format`, `structured_outputs` and `guided_…`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError, from_json

from services.gateway.body import Body, or_default

MAX_CHOICE_TEXTS = 4096


@dataclass(frozen=True)
class GrammarOption:
    """An option that sets the grammar of the answers."""

    kind: str
    """`json_schema`, `json_object`, `regex`, `choice`, `grammar` or `calls`."""
    value: str
    """The option's value, as JSON."""
    param: str
    """Its name in the body."""
    strict: bool = True
    """False ignores what cannot be enforced of a JSON schema."""


def _json_schema(value: Any) -> dict[str, Any] | None:
    """Return a JSON schema, given as an object or as its text."""
    schema = value
    if isinstance(value, str):
        try:
            schema = from_json(value, allow_inf_nan=False) if value else None
        except ValueError as error:
            raise PydanticCustomError("json_schema_value", "is no JSON: {error}", {"error": str(error)}) from error
    if schema is not None and not isinstance(schema, dict):
        raise PydanticCustomError("json_schema_type", "must be a JSON schema: an object, or its text")
    return schema


def _choices(value: Any) -> list[str]:
    texts = [] if value is None else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise PydanticCustomError("choice_type", "must be a list of texts")
    if len(texts) > MAX_CHOICE_TEXTS:
        raise PydanticCustomError("choice_value", f"must have at most {MAX_CHOICE_TEXTS} texts")
    return texts


JsonSchema = Annotated[
    dict[str, Any] | None, PlainValidator(_json_schema, json_schema_input_type=dict[str, Any] | str | None)
]
ChoiceTexts = Annotated[list[str], PlainValidator(_choices, json_schema_input_type=list[str])]
OptionalText = Annotated[str, or_default("")]


class SchemaFormat(Body):
    """The JSON schema of a `response_format`."""

    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: Annotated[bool, or_default(False)] = False


class ResponseFormat(Body):
    """OpenAI's `response_format`."""

    param: ClassVar[str] = "response_format"
    """Name of the option in the body."""
    schema_param: ClassVar[str] = "response_format.json_schema.schema"
    """Name of its schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: Annotated[SchemaFormat | None, Field(validate_default=True)] = None

    @field_validator("json_schema")
    @classmethod
    def _is_given(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("type") == "json_schema":
            raise PydanticCustomError("missing", "Field required")
        return value


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`."""

    json_: Annotated[JsonSchema, Field(alias="json")] = None
    json_object: Annotated[bool, or_default(False)] = False
    regex: OptionalText = ""
    choice: ChoiceTexts = Field(default=[])
    grammar: OptionalText = ""


class GrammarOptions(Body):
    """The options that set a grammar, of requests that generate text."""

    response_format: Annotated[ResponseFormat, or_default(ResponseFormat())] = ResponseFormat()
    guided_json: JsonSchema = None
    guided_regex: OptionalText = ""
    guided_choice: ChoiceTexts = Field(default=[])
    guided_grammar: OptionalText = ""
    structured_outputs: Annotated[StructuredOutputs, or_default(StructuredOutputs())] = StructuredOutputs()

    def grammars(self) -> list[GrammarOption]:
        """Return the options that are set; an answer can have one."""
        form, outputs = self.response_format, self.structured_outputs
        schema = form.json_schema if form.type == "json_schema" else None
        given = [
            ("json_object", form.type == "json_object", form.param),
            ("json_schema", self.guided_json, "guided_json"),
            ("regex", self.guided_regex, "guided_regex"),
            ("choice", self.guided_choice, "guided_choice"),
            ("grammar", self.guided_grammar, "guided_grammar"),
            ("json_schema", outputs.json_, "structured_outputs.json"),
            ("json_object", outputs.json_object, "structured_outputs.json_object"),
            ("regex", outputs.regex, "structured_outputs.regex"),
            ("choice", outputs.choice, "structured_outputs.choice"),
            ("grammar", outputs.grammar, "structured_outputs.grammar"),
        ]
        options = [
            GrammarOption(kind, json.dumps(value), param)
            for kind, value, param in given
            if value or (isinstance(value, dict) and kind == "json_schema")
        ]
        if schema is not None:
            value = json.dumps(schema.json_schema)
            options.append(GrammarOption("json_schema", value, form.schema_param, schema.strict))
        return options

    def check_grammars(self) -> None:
        """Raise PydanticCustomError if several options are set."""
        if len(several := [option.param for option in self.grammars()]) > 1:
            text = "{first}: an answer has one grammar, and {second} sets one too"
            raise PydanticCustomError("grammar_value", text, {"first": several[0], "second": several[1]})
