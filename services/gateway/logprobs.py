"""Log-probabilities in answers: OpenAI's objects for chats and text completions, and vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.gateway.answer import AnswerForm
from services.gateway.core.completion import Completion, Token
from shared.messages.logprobs import TokenLogprob
from shared.models.text import Detokenizer, Tokenizer

Fields = dict[str, Any]


@dataclass(frozen=True)
class LogprobFields:
    """Makes the `logprobs` of an answer's choices."""

    form: AnswerForm
    tokenizer: Tokenizer

    def of(self, tokens: Sequence[Token], start: int) -> Fields | None:
        """Return the `logprobs` of a choice or of a part of it; None if the request asks for none.

        start: characters of the choice's text before these tokens.
        """
        if self.form.logprobs is None or (not tokens and not self.form.prompt_only):
            return None
        return self._chat(tokens) if self.form.chat else self._completion(tokens, start)

    def prompt(self, completion: Completion, prompt: Sequence[int]) -> list[Token]:
        """Return the prompt's tokens with their log-probabilities, if the text begins with them."""
        if not self.form.echo or self.form.logprobs is None:
            return []
        detokenizer = Detokenizer(self.tokenizer)
        texts = [detokenizer.feed([token]) for token in prompt]
        known = [None, *completion.prompt_logprobs]
        return [Token(*one) for one in zip(prompt, texts, [False] * len(texts), known, strict=True)]

    def of_prompt(self, completion: Completion, prompt: Sequence[int]) -> list[Fields | None] | None:
        """Return vLLM's `prompt_logprobs`; None if the request asks for none."""
        count = self.form.prompt_logprobs
        if count is None:
            return None
        return [None] + [
            self._ranked(token, logprob, count)
            for token, logprob in zip(prompt[1:], completion.prompt_logprobs, strict=True)
        ]

    def _chat(self, tokens: Sequence[Token]) -> Fields:
        return {
            "content": [
                {
                    **self._named(token.id, token.logprob.logprob),
                    "top_logprobs": [self._named(*one) for one in token.logprob.top[: self.form.logprobs]],
                }
                for token in tokens
                if token.logprob is not None
            ],
            "refusal": None,
        }

    def _completion(self, tokens: Sequence[Token], start: int) -> Fields:
        offsets = []
        for token in tokens:
            offsets.append(start)
            start += len(token.text)
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [None if token.logprob is None else token.logprob.logprob for token in tokens],
            "top_logprobs": [self._top(token.id, token.logprob) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: int, logprob: TokenLogprob | None) -> Fields | None:
        """Return the most probable tokens and the chosen one, by name. Of equally named tokens the likeliest counts."""
        if logprob is None:
            return None
        found: Fields = {}
        for one, value in [*logprob.top[: self.form.logprobs], (token, logprob.logprob)]:
            found.setdefault(self._name(one), value)
        return found

    def _ranked(self, token: int, logprob: TokenLogprob, count: int) -> Fields:
        found = {token: (logprob.logprob, logprob.rank)}
        for rank, (one, value) in enumerate(logprob.top[:count], start=1):
            found.setdefault(one, (value, rank))
        return {
            str(one): {"logprob": value, "rank": rank, "decoded_token": self.tokenizer.token_text(one)}
            for one, (value, rank) in found.items()
        }

    def _named(self, token: int, logprob: float) -> Fields:
        text = self.tokenizer.token_text(token)
        own = self.tokenizer.token_bytes(token) or text.encode()
        return {"token": self._name(token), "logprob": logprob, "bytes": list(own)}

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self.form.token_ids else self.tokenizer.token_text(token)
