"""Request options that would change the text and are not supported, and the advice that a refusal gives.

The names are those of OpenAI's API and of servers whose clients speak it too: vLLM, SGLang, llama.cpp, Ollama,
text-generation-inference, and hosted ones. Options without an effect on the text, and those that have one only beside
another option of the table (such as `xtc_threshold`), are not listed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class UnsupportedOption:
    """An option that is refused, unless it is null or has a value that changes nothing."""

    harmless: tuple[Any, ...] = ()
    advice: str = ""
    """Added to the advice to leave the option out."""

    def refusal(self, value: Any) -> str | None:
        """Return what to do about a value of the option; None if the value changes nothing."""
        if value is None or any(same(value, harmless) for harmless in self.harmless):
            return None
        allowed = " or ".join(json.dumps(harmless) for harmless in (None, *self.harmless))
        advice = f"leave it out or send {allowed}"
        return f"{advice} ({self.advice})" if self.advice else advice


def _harmless(*values: Any) -> UnsupportedOption:
    return UnsupportedOption(values)


def _instead(text: str, *values: Any) -> UnsupportedOption:
    return UnsupportedOption(values, text)


_OFF = _harmless(False)
_NEVER = _harmless()
_ZERO = _harmless(0)
_ONE = _harmless(1)
_NO_LIST = _harmless([])
_NO_OBJECT = _harmless({})
_NO_TEXT = _harmless("")
_LENGTH = _instead("the most tokens are `max_tokens`", -1)
_OUTPUT_LENGTH = _instead("the most tokens are `max_output_tokens`", -1)
_BUDGET = _instead("in a chat the budget is `thinking_token_budget`")
_SEED = _instead("the seed is `seed`")
_MESSAGE = _instead("send it as a message", "")

_OUTPUT_FORM: dict[str, UnsupportedOption] = {
    "ebnf": _instead("the option is `guided_grammar`", ""),
    "format": _instead("the option is `response_format`", ""),
    "grammar": _instead("the option is `guided_grammar`", ""),
    "guided_decoding_backend": _NEVER,
    "guided_whitespace_pattern": _NO_TEXT,
    "json_schema": _instead("send it as `response_format`"),
    "regex": _instead("the option is `guided_regex`", ""),
    "structural_tag": _NEVER,
}
_TOOLS: dict[str, UnsupportedOption] = {
    "data_sources": _NO_LIST,
    "function_call": _instead("the option is `tool_choice` now", "none", "auto"),
    "functions": _instead("the option is `tools` now", []),
    "plugins": _NO_LIST,
    "search_parameters": _NEVER,
    "web_search_options": _NEVER,
}
_REASONING: dict[str, UnsupportedOption] = {
    "enable_thinking": _instead("variables of the chat template go into `chat_template_kwargs`"),
    "reasoning": _NEVER,
    "reasoning_budget": _BUDGET,
    "think": _NEVER,
    "thinking": _NEVER,
    "thinking_budget": _BUDGET,
    "thinking_budget_tokens": _BUDGET,
    "verbosity": _harmless("medium"),
}
_PROMPT: dict[str, UnsupportedOption] = {
    "adapter_id": _NO_TEXT,
    "audio": _NEVER,
    "chat_template": _NEVER,
    "context_length_exceeded_behavior": _harmless("error"),
    "documents": _NO_LIST,
    "image_data": _NO_LIST,
    "images": _NO_LIST,
    "input_prefix": _NO_TEXT,
    "input_suffix": _NO_TEXT,
    "instruction_template": _NO_TEXT,
    "lora": _NO_LIST,
    "lora_path": _NO_TEXT,
    "lora_request": _NEVER,
    "modalities": _harmless(["text"], []),
    "negative_prompt": _NO_TEXT,
    "prompt_embeds": _NEVER,
    "prompt_mode": _NEVER,
    "prompt_truncate_len": _NEVER,
    "safe_prompt": _OFF,
    "suffix": _NO_TEXT,
    "system": _MESSAGE,
    "system_prompt": _MESSAGE,
    "template": _NO_TEXT,
    "transforms": _NO_LIST,
    "truncate": _NEVER,
    "truncate_prompt_tokens": _NEVER,
}
_LENGTH_AND_STOP: dict[str, UnsupportedOption] = {
    "eos_token_id": _instead("further stop tokens are `stop_token_ids`"),
    "max_length": _LENGTH,
    "max_new_tokens": _LENGTH,
    "max_output_tokens": _LENGTH,
    "max_time": _NEVER,
    "min_length": _instead("the fewest tokens are `min_tokens`", 0),
    "min_new_tokens": _instead("the fewest tokens are `min_tokens`", 0),
    "n_indent": _ZERO,
    "n_predict": _LENGTH,
    "no_stop_trim": _OFF,
    "num_predict": _LENGTH,
    "return_full_text": _OFF,
    "stop_regex": _NO_LIST,
    "stop_sequences": _instead("stop texts are `stop`", []),
    "t_max_predict_ms": _ZERO,
}
_TOKENS: dict[str, UnsupportedOption] = {
    "bad_words_ids": _NO_LIST,
    "ban_eos_token": _OFF,
    "custom_token_bans": _NO_TEXT,
    "custom_logit_processor": _NO_TEXT,
    "custom_params": _NO_OBJECT,
    "force_words_ids": _NO_LIST,
    "forced_eos_token_id": _NEVER,
    "logits_processors": _NO_LIST,
    "sequence_bias": _harmless({}, []),
    "skip_special_tokens": _harmless(True),
    "spaces_between_special_tokens": _harmless(True),
    "suppress_tokens": _NO_LIST,
    "vllm_xargs": _NO_OBJECT,
    "watermark": _OFF,
}
_SAMPLERS: dict[str, UnsupportedOption] = {
    "adaptive_target": _harmless(-1),
    "cfg_scale": _ONE,
    "diversity_penalty": _ZERO,
    "do_sample": _instead("a `temperature` of 0 takes the most probable token"),
    "dry_multiplier": _ZERO,
    "dynamic_temperature": _OFF,
    "dynatemp_range": _ZERO,
    "early_stopping": _OFF,
    "encoder_repetition_penalty": _ONE,
    "epsilon_cutoff": _ZERO,
    "eta_cutoff": _ZERO,
    "guidance_scale": _ONE,
    "length_penalty": _ONE,
    "mirostat": _ZERO,
    "mirostat_mode": _ZERO,
    "mirostat_target": _NEVER,
    "no_repeat_ngram_size": _ZERO,
    "nsigma": _harmless(0, -1),
    "num_beams": _ONE,
    "penalty_alpha": _ZERO,
    "random_seed": _SEED,
    "repeat_penalty": _instead("the penalty is `repetition_penalty`", 1),
    "repetition_detection": _NEVER,
    "samplers": _NO_LIST,
    "sampler_seq": _NO_TEXT,
    "smoothing_factor": _ZERO,
    "temperature_last": _OFF,
    "tfs": _ONE,
    "tfs_z": _ONE,
    "top_a": _ZERO,
    "top_n_sigma": _harmless(0, -1),
    "typical": _ONE,
    "typical_p": _ONE,
    "use_beam_search": _OFF,
    "xtc_probability": _ZERO,
}
_PROBABILITIES: dict[str, UnsupportedOption] = {
    "n_probs": _instead("log-probabilities are `logprobs`", 0),
    "return_logprob": _instead("log-probabilities are `logprobs`", False),
    "top_n_tokens": _ZERO,
}
_CONTAINERS: dict[str, UnsupportedOption] = {
    "extra_body": _instead("it is an argument of OpenAI's Python client; send its fields beside `model`", {}),
    "generation_config": _instead("send its fields beside `model`", {}),
    "nvext": _NO_OBJECT,
    "options": _instead("send its fields beside `model`", {}),
    "parameters": _instead("send its fields beside `model`", {}),
    "sampling_params": _instead("send its fields beside `model`", {}),
}
"""Objects that hold options."""

_BOTH = (
    _OUTPUT_FORM | _TOOLS | _REASONING | _PROMPT | _LENGTH_AND_STOP | _TOKENS | _SAMPLERS | _PROBABILITIES | _CONTAINERS
)

CHAT_OPTIONS: Mapping[str, UnsupportedOption] = _BOTH | {
    "add_special_tokens": _OFF,
    "echo": _OFF,
}
"""Unsupported options of chats."""


def _without_advice(*own: str) -> dict[str, UnsupportedOption]:
    """Return the unsupported options of chats for the body of another API.

    The advice is left out, since it names options of chats. own: options that the body has.
    """
    return {name: UnsupportedOption(option.harmless) for name, option in CHAT_OPTIONS.items() if name not in own}


COMPLETION_OPTIONS: Mapping[str, UnsupportedOption] = _BOTH | {
    "add_generation_prompt": _harmless(True),
    "chat_template_kwargs": _NO_OBJECT,
    "continue_final_message": _OFF,
    "reasoning_effort": _NEVER,
    "thinking_token_budget": _NEVER,
    "add_special_tokens": _harmless(True),
    "top_logprobs": _instead("in a text completion the number is `logprobs`", 0),
    "tool_choice": _harmless("none", "auto"),
    "tools": _instead("chats have tools", []),
}
"""Unsupported options of text completions."""

RESPONSES_OPTIONS: Mapping[str, UnsupportedOption] = {
    **_without_advice("max_output_tokens", "reasoning"),
    "background": _OFF,
    "conversation": _NEVER,
    "include": _NO_LIST,
    "logprobs": _OFF,
    "max_completion_tokens": _OUTPUT_LENGTH,
    "max_tokens": _OUTPUT_LENGTH,
    "max_tool_calls": _NEVER,
    "messages": _instead("the conversation is `input`"),
    "n": _ONE,
    "prompt": _NEVER,
    "service_tier": _harmless("auto"),
    "stop": _NO_LIST,
    "top_logprobs": _ZERO,
    "truncation": _harmless("disabled"),
}
"""Unsupported options of the Responses API, beside those of chats that its body lacks (`ChatForm`)."""

MESSAGES_OPTIONS: Mapping[str, UnsupportedOption] = {
    **_without_advice("stop_sequences", "system", "thinking"),
    "container": _NEVER,
    "context_management": _NEVER,
    "max_completion_tokens": _LENGTH,
    "mcp_servers": _NO_LIST,
    "output_format": _instead("the option is `output_config`"),
    "service_tier": _harmless("auto", "standard_only"),
    "stop": _instead("stop texts are `stop_sequences`", []),
}
"""Unsupported options of Anthropic's messages, beside those of chats that their bodies lack (`ChatForm`)."""

MESSAGE_OPTIONS: Mapping[str, UnsupportedOption] = {
    "audio": _NEVER,
    "function_call": _NEVER,
    "prefix": _OFF,
}
"""Unsupported fields of a chat's messages."""


STRUCTURED_OPTIONS: Mapping[str, UnsupportedOption] = {
    "disable_additional_properties": _OFF,
    "structural_tag": _NEVER,
    "whitespace_pattern": _NO_TEXT,
}
"""Unsupported fields of `structured_outputs`."""


def same(value: Any, harmless: Any) -> bool:
    """Return whether a value of a body is one that changes nothing."""
    # In Python 0 equals False and 1 equals True; in JSON they have different types.
    return isinstance(value, bool) == isinstance(harmless, bool) and bool(value == harmless)
