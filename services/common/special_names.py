"""Special tokens in what people type. Owns: finding their names in a text, and breaking them.

Must not know: tokenizers. Texts are megabytes and may be written to be slow, and an expression keeps every
other thread from running for as long as one call of it takes, the event loop's included.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator

# Characters that one call looks at: some hundred microseconds, or a few milliseconds at worst.
SLICE_CHARS = 1 << 14
# A vocabulary may have hundreds of names that begin alike, `<|reserved_special_token_17|>`. Tried one after
# the other at each place they take a hundred times as long as by their beginnings. Expressions cannot be
# nested without bound; beyond this the names are tried one after the other.
NESTED_MAX = 24


class SpecialNames:
    """Finds and breaks the names of special tokens; where one begins another, the longer one counts.

    Args:
        names: The names, none of them empty; at least one.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._pattern = re.compile(_expression(sorted(set(names)), NESTED_MAX))
        self._beyond = max(map(len, names)) - 1

    def found(self, text: str) -> Iterator[re.Match[str]]:
        """The names in a text, from its beginning on, none of which share a character."""
        at, begins = 0, 0
        while begins < len(text):
            border = begins + SLICE_CHARS
            # A name that begins before the border is seen whole, and so are all that it could be.
            for match in self._pattern.finditer(text, max(at, begins), border + self._beyond):
                if match.start() >= border:
                    break
                at = match.end()
                yield match
            begins = border

    def broken(self, text: str, guard: str) -> str:
        """The text with `guard` between the characters of each name."""
        # Breaking one can leave another that began inside it; each round breaks at least one.
        while True:
            parts: list[str] = []
            at = 0
            for match in self.found(text):
                parts += text[at : match.start()], guard.join(match.group())
                at = match.end()
            if not parts:
                return text
            text = "".join((*parts, text[at:]))


def used_characters(texts: Collection[str]) -> set[str]:
    """All characters of some texts."""
    used: set[str] = set()
    for text in texts:
        for at in range(0, len(text), SLICE_CHARS):
            used.update(text[at : at + SLICE_CHARS])
    return used


def _expression(names: list[str], nested_max: int) -> str:
    """What matches the longest of some names, which are sorted and none twice, by their common beginnings."""
    if not nested_max:
        return "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    common = os.path.commonprefix((names[0], names[-1]))  # noqa: RUF071 - of characters, not of paths
    # The shortest comes first: whether the common beginning is a name itself.
    whole = names[0] == common
    following: dict[str, list[str]] = {}
    for name in names[whole:]:
        rest = name[len(common) :]
        following.setdefault(rest[0], []).append(rest)
    if not following:
        return re.escape(common)
    branches = "|".join(_expression(rests, nested_max - 1) for rests in following.values())
    return f"{re.escape(common)}(?:{branches}){'?' if whole else ''}"
