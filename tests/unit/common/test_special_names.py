"""Names of special tokens in long texts: the same as one plain expression finds, and nobody waits long."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common import special_names
from services.common.special_names import SpecialNames, used_characters

# Names of which one is the beginning of another, or stands in it, or begins where it ends.
NAMES = st.sets(st.text(alphabet="ab|", min_size=2, max_size=7), min_size=1, max_size=12)
TYPED = st.text(alphabet="ab|x", max_size=60)


def plain(names: set[str]) -> re.Pattern[str]:
    """One expression of all names, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


@pytest.mark.parametrize("nested_max", [0, 1, special_names.NESTED_MAX])
@given(NAMES, TYPED, st.integers(1, 9))
def test_names_are_found_as_by_one_expression(
    nested_max: int, names: set[str], text: str, slice_chars: int
) -> None:
    """Wherever the slices end, and however far names are told apart by their beginnings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(special_names, "SLICE_CHARS", slice_chars)
        patch.setattr(special_names, "NESTED_MAX", nested_max)
        special = SpecialNames(names)
        spans = [match.span() for match in special.found(text)]
        broken = special.broken(text, "~")
        used = used_characters((text, "y"))
    expression = plain(names)
    assert spans == [match.span() for match in expression.finditer(text)]
    assert expression.search(broken) is None
    assert broken.replace("~", "") == text
    assert spans or broken == text
    assert used == {*text, "y"}


def test_a_name_of_many_that_begin_each_other_is_found() -> None:
    """An expression that is nested as deep as they are long would be refused by the library."""
    special = SpecialNames(["a" * length for length in range(2, 400)])
    assert [match.span() for match in special.found("b" + "a" * 400)] == [(1, 400)]


def test_the_beginning_of_many_names_said_again_and_again_takes_little() -> None:
    """All of it takes less than a tenth of it does where the names are tried one after the other."""
    names = {f"<|reserved_special_token_{number}|>" for number in range(250)} | {"<|end|>"}
    special, expression = SpecialNames(names), plain(names)
    text = "<|reserved_special_token_24" * 30_000
    began_s = time.thread_time()
    assert expression.search(text[: len(text) // 10]) is None
    tenth_s = time.thread_time() - began_s
    began_s = time.thread_time()
    assert next(special.found(text), None) is None
    assert time.thread_time() - began_s < tenth_s


def test_no_call_looks_at_more_than_a_slice() -> None:
    """An expression keeps all other threads waiting for as long as one call of it takes."""
    special = SpecialNames(["<|end|>", "<|a|>"])
    text = "x" * 100_000 + "<|end|>"
    looked: list[int] = []

    class Watched:
        """The expression, and who asks it."""

        def finditer(self, text: str, begins: int, ends: int) -> Iterator[re.Match[str]]:
            """See `re.Pattern.finditer`."""
            looked.append(ends - begins)
            return inner.finditer(text, begins, ends)

    inner = special._pattern
    special._pattern = Watched()  # type: ignore[assignment]
    assert [match.start() for match in special.found(text)] == [100_000]
    assert max(looked) <= special_names.SLICE_CHARS + len("<|end|>") - 1
