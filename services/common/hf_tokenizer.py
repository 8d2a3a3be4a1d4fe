"""Hugging Face tokenizers without transformers. Owns: a revision's text to ids and back.

Must not know: which model serves, or who asks. Special tokens that somebody types stay text: in what callers
send, each occurrence is broken by a private character before the template sees it. The rendered text is then
cut at the special tokens that the template itself wrote, as the tokenizer would, and the pieces between are
encoded, the private characters taken out, by a tokenizer that treats special tokens as text.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from services.common.chat_template import RENDER_LIMIT_S, ChatTemplate
from services.common.conversation import Aside, Message
from services.common.errors import ArgumentInvalid, ArtifactInvalid
from services.common.special_names import SpecialNames, used_characters
from services.common.token_pieces import TokenPiece, TokenPieces

# A short prompt is encoded within half a millisecond: waking a thread for it, which then fights the event
# loop for the interpreter, delays everybody for longer.
BRIEF_CHARS_MAX = 1_000
# A template that takes longer over a short prompt does its work in a thread for a while. It is tried again,
# because a machine that stood still for a moment makes every template look slow.
BRIEF_RENDER_LIMIT_S = 0.005
SLOW_PAUSE_S = 5.0

# A longer text is encoded as a batch of one: for a batch alone the library lets go of the interpreter, and
# otherwise stops everybody else, the event loop too, for a second a megabyte. Of a short one that costs more.
ALONE_CHARS_MAX = 4 * BRIEF_CHARS_MAX
# A batch of one is no work for several threads, which the library would begin for it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Texts of single tokens that are kept, and what they stand for: those of the commonest of a large vocabulary,
# in a few megabytes each.
ALONE_MAX = 1 << 15

# Characters that no text uses by agreement; the first that a conversation does not contain breaks tokens.
_PRIVATE = range(0xE000, 0xF8FF)

_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


class HfTokenizer:
    """The tokenizer and chat template of one revision.

    Args:
        tokenizer: Reads special tokens as such.
        template: The chat template; None: text is encoded as it is.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._literal = _twin(tokenizer)
        self._literal.encode_special_tokens = True
        self._specials = _special_ids(tokenizer)
        self._special = SpecialNames(self._specials) if self._specials else None
        self._decode_alone = functools.lru_cache(ALONE_MAX)(self._decode_one)
        pieces = TokenPieces(
            _special_names(tokenizer), _decoder_kinds(tokenizer), tokenizer.id_to_token, tokenizer.decode
        )
        self._read_piece = functools.lru_cache(ALONE_MAX)(pieces.read)
        self._brief_from_s = 0.0

    @classmethod
    def load(cls, directory: Path) -> HfTokenizer:
        """Reads `tokenizer.json`, and the template where there is one. Blocks.

        Raises:
            ArtifactInvalid: A file is missing or not usable.
        """
        try:
            tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # noqa: BLE001 - the library raises plain Exception
            raise ArtifactInvalid(f"tokenizer.json: not usable: {type(error).__name__}.") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = _read_config(directory / "tokenizer_config.json")
        source = _template_source(directory, config)
        template = None if source is None else ChatTemplate(source, _variables(config))
        return cls(tokenizer, template)

    @property
    def vocabulary(self) -> int:
        """See `Tokenizer.vocabulary`."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    async def encode(self, messages: Sequence[Message], aside: Aside) -> tuple[int, ...]:
        """See `Tokenizer.encode`."""
        is_brief = sum(len(turn.role) + len(turn.content) for turn in messages) <= BRIEF_CHARS_MAX
        if is_brief and time.monotonic() >= self._brief_from_s:
            ids = self._encode_within(messages, BRIEF_RENDER_LIMIT_S)
            if ids is not None:
                return ids
            self._brief_from_s = time.monotonic() + SLOW_PAUSE_S
        return await aside(functools.partial(self.encode_now, messages))

    async def encode_raw(self, text: str, aside: Aside) -> tuple[int, ...]:
        """See `Tokenizer.encode_raw`."""
        if len(text) <= BRIEF_CHARS_MAX:
            return self._encode_raw_now(text)
        return await aside(functools.partial(self._encode_raw_now, text))

    def _encode_raw_now(self, text: str) -> tuple[int, ...]:
        return tuple(_encoded(self._literal, text, begin=True))

    def encode_now(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Renders and encodes a conversation. Blocks.

        Raises:
            ArgumentInvalid: The template refuses the conversation, or there is none for more than a text.
        """
        ids = self._encode_within(messages, RENDER_LIMIT_S)
        if ids is None:
            raise ArgumentInvalid("messages: the model's chat template took too long over them.")
        return ids

    def encode_user(self, text: str) -> tuple[int, ...]:
        """Renders and encodes one turn of a user. Blocks.

        Raises:
            ArgumentInvalid: The template refuses it.
        """
        return self.encode_now([Message("user", text)])

    def decode(self, token_ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        if len(token_ids) == 1:
            # Every token of every stream is decoded alone once, as what the next one follows.
            return self._decode_alone(token_ids[0])
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def piece(self, token_id: int) -> TokenPiece:
        """See `Tokenizer.piece`."""
        return self._read_piece(token_id)

    def _decode_one(self, token_id: int) -> str:
        return str(self._tokenizer.decode((token_id,), skip_special_tokens=True))

    def _encode_within(self, messages: Sequence[Message], limit_s: float) -> tuple[int, ...] | None:
        """The ids; None where the template takes longer than `limit_s`."""
        if self._template is None:
            return self._encode_plain(messages)
        guard, broken = self._break_specials(messages)
        rendered = self._template.render_within(broken, limit_s)
        if rendered is None:
            return None
        if guard is None:
            # Nobody typed a special token: one call, which is right for every kind of tokenizer.
            return tuple(_encoded(self._tokenizer, rendered))
        return tuple(self._encode_pieces(rendered, guard))

    def _encode_plain(self, messages: Sequence[Message]) -> tuple[int, ...]:
        if len(messages) != 1:
            raise ArgumentInvalid("messages: this model has no chat template; send one text.")
        return tuple(_encoded(self._literal, messages[0].content, begin=True))

    def _break_specials(self, messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
        """Returns the character that breaks special tokens in `messages`, and the broken messages."""
        texts = [text for message in messages for text in (message.role, message.content)]
        special = self._special
        if special is None or not any(next(special.found(text), None) for text in texts):
            return None, messages
        guard = _unused_character(texts)
        return guard, [
            Message(special.broken(message.role, guard), special.broken(message.content, guard))
            for message in messages
        ]

    def _encode_pieces(self, rendered: str, guard: str) -> Iterable[int]:
        assert self._special is not None
        at = 0
        for match in self._special.found(rendered):
            yield from self._encode_literal(rendered[at : match.start()], guard)
            yield self._specials[match.group()]
            at = match.end()
        yield from self._encode_literal(rendered[at:], guard)

    def _encode_literal(self, text: str, guard: str) -> Sequence[int]:
        plain = text.replace(guard, "")
        return _encoded(self._literal, plain) if plain else ()


def _encoded(tokenizer: Tokenizer, text: str, *, begin: bool = False) -> Sequence[int]:
    """The ids of a text; `begin`: with what the model begins and ends its texts with."""
    if len(text) <= ALONE_CHARS_MAX:
        ids: Sequence[int] = tokenizer.encode(text, add_special_tokens=begin).ids
    else:
        ids = tokenizer.encode_batch_fast([text], add_special_tokens=begin)[0].ids
    return ids


def _twin(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with settings of its own.

    The two share their model: reading megabytes of merges again would keep the interpreter from everybody
    else, for the library does not let go of it meanwhile.
    """
    twin = Tokenizer(tokenizer.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (value := getattr(tokenizer, part)) is not None:
            setattr(twin, part, value)
    added = tokenizer.get_added_tokens_decoder()
    twin.add_tokens([added[token_id] for token_id in sorted(added)])
    if twin.get_added_tokens_decoder() == added:
        return twin
    # Tokens that were added with gaps between their ids cannot be added so again.
    return Tokenizer.from_str(tokenizer.to_str())


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Special tokens by their text. One of a single character cannot be told from that character."""
    added = tokenizer.get_added_tokens_decoder()
    return {
        token.content: token_id
        for token_id, token in added.items()
        if token.special and len(token.content) > 1
    }


def _special_names(tokenizer: Tokenizer) -> dict[int, str]:
    """All special tokens by their ids."""
    added = tokenizer.get_added_tokens_decoder()
    return {token_id: token.content for token_id, token in added.items() if token.special}


def _decoder_kinds(tokenizer: Tokenizer) -> frozenset[str]:
    """The kinds of decoder that make the tokens text, those within others among them."""
    # The library has no other way to look into a decoder.
    parts = [] if tokenizer.decoder is None else [json.loads(tokenizer.decoder.__getstate__())]
    kinds: set[str] = set()
    while parts:
        part = parts.pop()
        kinds.add(part["type"])
        parts.extend(part.get("decoders", ()))
    return frozenset(kinds)


def _unused_character(texts: Sequence[str]) -> str:
    used = used_characters(texts)
    for number in _PRIVATE:
        if chr(number) not in used:
            return chr(number)
    raise ArgumentInvalid("messages: use fewer private-use characters.")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError, RecursionError):
        raise ArtifactInvalid(f"{path.name}: not readable as JSON.") from None
    if not isinstance(config, dict):
        raise ArtifactInvalid(f"{path.name}: not a JSON object.")
    return config


def _template_source(directory: Path, config: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    try:
        if path.exists():
            return path.read_text()
    except (OSError, UnicodeDecodeError):
        raise ArtifactInvalid(f"{path.name}: not readable as text.") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        # Older files hold several by name.
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _variables(config: dict[str, Any]) -> dict[str, str]:
    """The special tokens that a template may name."""
    found: dict[str, str] = {}
    for name in _NAMED:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        found[name] = value if isinstance(value, str) else ""
    return found
