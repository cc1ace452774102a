"""Tokenizer and incremental detokenizer, without torch."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers

from shared.errors import ChatTemplateError, ModelError
from shared.models.chat import ChatTemplate
from shared.models.folder import ModelFolder


class Tokenizer:
    """The tokenizer of a model folder. Raises ModelError if tokenizer.json can't be used."""

    def __init__(self, folder: ModelFolder) -> None:
        self._path = folder.path / "tokenizer.json"
        self._backend = self._load()
        added = self._backend.get_added_tokens_decoder()
        self.special_tokens: dict[str, int] = {token.content: index for index, token in added.items() if token.special}
        """Ids of the control tokens by their text."""
        self._special_ids = frozenset(self.special_tokens.values())
        self._added = {token.content: index for index, token in added.items()}
        self._special_text = re.compile(
            "|".join(re.escape(token) for token in sorted(self.special_tokens, key=len, reverse=True)) or r"(?!)"
        )
        self._template = ChatTemplate(folder) if folder.chat_template else None
        self._bytes_of = _TokenBytes(self._backend, self._path)

    def added_token(self, text: str) -> int | None:
        """Return the id of the token that stands for this text wherever the text occurs; None if there is none."""
        return self._added.get(text)

    @cached_property
    def blank_ids(self) -> list[int]:
        """Ids of the tokens that are nothing but white space, ascending."""
        vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return sorted(token for token in vocab.values() if self.token_bytes(token).decode("utf-8", "replace").isspace())

    @property
    def largest_id(self) -> int:
        """Largest token id of the tokenizer."""
        vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return max(vocab.values())

    @property
    def strips_spaces(self) -> int:
        """Number of leading spaces that decoding removes from a text: 1 in SentencePiece models, else 0."""
        return self._bytes_of.strips_spaces

    def encode(self, text: str) -> list[int]:
        """Return the ids of a raw prompt, equal to those of transformers' tokenizer.

        Control tokens written out in the text become control tokens. Those that the model puts around every text (such
        as a beginning-of-text token) are added. For a user's words in a conversation use `render_chat`.
        """
        return _ids(self._backend, _unicode(text), special=True)

    def encode_part(self, text: str) -> list[int]:
        """Return the ids of a part of a text, without the control tokens that the model puts around every text."""
        return _ids(self._backend, _unicode(text), special=False)

    def spellings(self, word: str) -> list[list[int]]:
        """Return the ids of a word at the start of a text and after a space.

        The second one is left out where it is the first one behind a token of its own for the space. The rule is
        vLLM's, for `bad_words`.
        """
        bare, spaced = self.encode_part(word), self.encode_part(" " + word.lstrip())
        if spaced and bare and spaced[0] != bare[0] and len(spaced) == len(bare):
            return [bare, spaced]
        return [bare] if bare else []

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of these tokens, without control tokens. Invalid UTF-8 becomes U+FFFD."""
        stream = Detokenizer(self)
        return stream.feed(ids) + stream.flush()

    def token_text(self, token: int) -> str:
        """Return the text of a token by itself, control tokens included. Bytes of a part of a character are U+FFFD."""
        if token in self._special_ids:
            return str(self._backend.id_to_token(token))
        return self._bytes_of[token].decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """Return the token's bytes in a text: none for control tokens and unknown ids."""
        return b"" if token in self._special_ids else self._bytes_of[token]

    @property
    def tool_template(self) -> str:
        """The chat template for conversations with tools, if it shows them to the model; else an empty text."""
        return self._template.source if self._template is not None and self._template.takes_tools else ""

    @property
    def thinks(self) -> bool:
        """True if the model's answers may contain its reasoning between `<think>` tags."""
        return self._template is not None and self._template.thinks

    @property
    def template_variables(self) -> frozenset[str]:
        """Names of the chat template's own variables."""
        return frozenset() if self._template is None else self._template.variables

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        continues: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the ids of a conversation in the model's chat template.

        continues: end with the last message's content, for an answer that continues it; no generation prompt is added.
        variables: values of the template's own variables.

        `messages` are OpenAI's: a role and content, a string or a list of text parts; `tools` are OpenAI's too. Ids are
        those of transformers' `apply_chat_template`, except that control tokens written out in a message or a tool stay
        plain text: only the template makes control tokens.

        Raises ChatTemplateError if the model has no template or the template refuses the messages.
        """
        if self._template is None:
            raise ChatTemplateError(
                f"{self._path.parent} has no chat template, so it can only complete raw prompts: use /v1/completions, "
                "or name an instruction-tuned model's folder."
            )
        quoting = _Quoting(self._special_text, messages, tools, variables or {})
        if continues:
            rendered = self._render_open(quoting)
        else:
            rendered = self._template.render(quoting.messages, add_generation_prompt, quoting.tools, quoting.variables)
        own = [self.special_tokens[token] for token in self._special_text.findall(rendered)]
        ids = _ids(self._backend, rendered, special=False)
        # The second condition is for normalizers that turn look-alikes into control tokens.
        if not quoting.replaced and [token for token in ids if token in self._special_ids] == own:
            return ids
        return self._encode_own_control_tokens(rendered, quoting)

    def _render_open(self, quoting: _Quoting) -> str:
        """Return the text of a conversation up to the end of its last message's content."""
        assert self._template is not None
        if not quoting.messages:
            raise ChatTemplateError("messages is empty: send at least one message.")
        *others, last = quoting.messages
        content, mark = last.get("content"), quoting.unused()
        if isinstance(content, list) and content and isinstance(content[-1], dict) and "text" in content[-1]:
            marked: Any = [*content[:-1], {**content[-1], "text": content[-1]["text"] + mark}]
        elif isinstance(content, str):
            marked = content + mark
        else:
            raise ChatTemplateError("the last message has no text that could be continued.")
        messages = [*others, {**last, "content": marked}]
        rendered, found, _ = self._template.render(messages, False, quoting.tools, quoting.variables).rpartition(mark)
        if not found:
            raise ChatTemplateError(
                "the model's chat template does not show the last message, so it can't be continued."
            )
        return rendered

    def _encode_own_control_tokens(self, rendered: str, quoting: _Quoting) -> list[int]:
        ids: list[int] = []
        end = 0
        for token in self._special_text.finditer(rendered):
            ids += self.encode_plain(quoting.restore(rendered[end : token.start()]))
            ids.append(self.special_tokens[token.group()])
            end = token.end()
        return ids + self.encode_plain(quoting.restore(rendered[end:]))

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of a text in which the text of control tokens has no meaning."""
        return _ids(self._plain_backend, text, special=False)

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """A second backend, made only when a message contains a control token's text, to save its memory."""
        backend = self._load()
        backend.encode_special_tokens = True  # sic: encodes their text as if it had no meaning
        return backend

    def _load(self) -> tokenizers.Tokenizer:
        try:
            backend = tokenizers.Tokenizer.from_file(str(self._path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"{self._path} can't be read ({error}). Download the model again.") from error
        # Some models store a truncation from training. The gateway limits prompts; they are never truncated.
        backend.no_truncation()
        backend.no_padding()
        return backend


class Detokenizer:
    """Decodes a growing sequence of tokens. The returned texts join to `Tokenizer.decode` of all tokens."""

    def __init__(self, tokenizer: Tokenizer, shown: Collection[str] = ()) -> None:
        """shown: control tokens that are part of the text; `Tokenizer.decode` leaves all of them out."""
        self._tokenizer = tokenizer
        special = tokenizer.special_tokens
        self._shown = {special[token]: token.encode() for token in shown if token in special}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._spaces_to_strip = tokenizer.strips_spaces

    def feed(self, ids: Iterable[int]) -> str:
        """Add tokens; return the text that they complete. An incomplete character is kept for the next call."""
        text = self._utf8.decode(b"".join(self._shown.get(each) or self._tokenizer.token_bytes(each) for each in ids))
        while text and self._spaces_to_strip:
            text = text.removeprefix(" ")
            self._spaces_to_strip = self._spaces_to_strip - 1 if text.startswith(" ") else 0
        return text

    def flush(self) -> str:
        """End the sequence; return U+FFFD for an incomplete character, else nothing."""
        return self._utf8.decode(b"", final=True)


class _Quoting:
    """Messages and tools in which the text of control tokens is replaced by characters that occur nowhere in them."""

    def __init__(
        self,
        control_tokens: re.Pattern[str],
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
    ) -> None:
        self._control_tokens = control_tokens
        self._used = set(json.dumps([*messages, *tools, variables], ensure_ascii=False, default=str))
        self._unused = (chr(code) for code in range(0xE000, 0x110000) if chr(code) not in self._used)
        self._stand_ins: dict[str, str] = {}
        self.messages = [self._quote(message) for message in messages]
        self.tools = [self._quote(tool) for tool in tools]
        self.variables: dict[str, Any] = self._quote(variables)

    @property
    def replaced(self) -> bool:
        return bool(self._stand_ins)

    def unused(self) -> str:
        """Return a character that occurs nowhere in the messages."""
        return next(self._unused)

    def restore(self, text: str) -> str:
        for token, stand_in in self._stand_ins.items():
            text = text.replace(stand_in, token)
        return text

    def _quote(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._control_tokens.sub(self._stand_in, _unicode(value))
        if isinstance(value, Mapping):
            return {self._quote(key): self._quote(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._quote(item) for item in value]
        return value

    def _stand_in(self, token: re.Match[str]) -> str:
        if token.group() not in self._stand_ins:
            self._stand_ins[token.group()] = next(self._unused)
        return self._stand_ins[token.group()]


class _TokenBytes(dict[int, bytes]):
    """Bytes of each token as the tokenizer's decoder makes them, computed on first use.

    Supports the two kinds of decoders of causal language models: byte-level BPE, and SentencePiece with `▁` for a space
    and `<0x0A>` for a byte.
    """

    def __init__(self, backend: tokenizers.Tokenizer, path: Any) -> None:
        super().__init__()
        self._backend = backend
        steps = _decoder_steps(backend)
        kinds = {step["type"] for step in steps}
        self._is_byte_level = "ByteLevel" in kinds
        if not self._is_byte_level and not kinds & {"ByteFallback", "Metaspace"}:
            raise ModelError(
                f"{path}: the decoder {sorted(kinds) or None} is neither byte-level nor SentencePiece's, "
                "so its text can't be streamed. Name another model's folder."
            )
        self._space = next((step["replacement"] for step in steps if step["type"] == "Metaspace"), "▁")
        self.strips_spaces: int = sum(
            step["start"]
            if step["type"] == "Strip"
            else step["type"] == "Metaspace" and step.get("prepend_scheme") != "never"
            for step in steps
        )

    def __missing__(self, index: int) -> bytes:
        token = self._backend.id_to_token(index)
        self[index] = piece = b"" if token is None else self._piece(token)
        return piece

    def _piece(self, token: str) -> bytes:
        if self._is_byte_level:
            try:
                return bytes(_BYTE_OF[character] for character in token)
            except KeyError:  # an added token, which is text and not bytes
                return token.encode()
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace(self._space, " ").encode()


def _ids(backend: tokenizers.Tokenizer, text: str, *, special: bool) -> list[int]:
    # The batch call releases the GIL; `encode` holds it, for over a second on a long text.
    return backend.encode_batch_fast([text], add_special_tokens=special)[0].ids


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    decoder = json.loads(backend.decoder.__getstate__())
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _bytes_of_characters() -> dict[str, int]:
    """Return GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _bytes_of_characters()


def _unicode(text: str) -> str:
    """Return the text with question marks for lone surrogates, which are valid in JSON but not in UTF-8."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
