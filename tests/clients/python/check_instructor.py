"""instructor, in each of its modes for OpenAI's API."""

from __future__ import annotations

import instructor
import openai
import pytest
from instructor.core import InstructorRetryException
from suite import ASK, MODEL, TOKENS, TOO_LONG, URL, Weather


def client(mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(openai.OpenAI(base_url=URL, api_key="none", max_retries=0), mode=mode)


@pytest.mark.parametrize(
    "mode", [instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA], ids=lambda m: m.value
)
def check_a_type_whole_and_streamed(mode: instructor.Mode) -> None:
    options = {"model": MODEL, "messages": ASK, "max_tokens": TOKENS, "temperature": 0, "response_model": Weather}
    whole = client(mode).chat.completions.create(**options, max_retries=0)
    assert isinstance(whole, Weather)
    *_, last = client(mode).chat.completions.create_partial(**options)
    assert last.model_dump() == whole.model_dump()


def check_a_prompt_that_is_too_long() -> None:
    with pytest.raises(InstructorRetryException, match="context"):
        client(instructor.Mode.TOOLS).chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": TOO_LONG}], response_model=Weather, max_retries=0
        )
