"""The text that everything is measured on. Owns: where it comes from and how prompts are cut out of it.

It is the language reference that Python carries for its own help (`pydoc_data.topics`): English, long enough,
and on every machine already.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from pydoc_data import topics

# No tokenizer in use makes more than two tokens of three characters of English on average.
_CHARACTERS_PER_TOKEN_MAX = 6


@functools.cache
def text_ids(directory: Path, tokens: int) -> tuple[int, ...]:
    """The first tokens of the text, by the model's tokenizer.

    A model without a tokenizer gets ids that are spread over its vocabulary instead; speed can be measured
    on them, quality cannot.
    """
    if not (directory / "tokenizer.json").exists():
        return _spread_ids(directory, tokens)
    from tokenizers import Tokenizer  # noqa: PLC0415 - it reads its environment when it is imported

    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return tuple(tokenizer.encode(text[: _CHARACTERS_PER_TOKEN_MAX * tokens]).ids[:tokens])


def cut(directory: Path, number: int, tokens: int) -> tuple[tuple[int, ...], ...]:
    """`number` prompts of so many tokens each, one behind the other in the text."""
    ids = text_ids(directory, number * tokens)
    return tuple(ids[first : first + tokens] for first in range(0, number * tokens, tokens))


def _spread_ids(directory: Path, tokens: int) -> tuple[int, ...]:
    vocabulary = int(json.loads((directory / "config.json").read_text())["vocab_size"])
    # The first ids tend to be special. The square keeps prompts from repeating one another.
    special = min(10, vocabulary // 2)
    return tuple(special + (17 * place + place * place) % (vocabulary - special) for place in range(tokens))
