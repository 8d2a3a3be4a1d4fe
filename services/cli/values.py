"""The values of arguments. Owns: how the text of each kind is read, and what is said of one that is none."""

from __future__ import annotations

import argparse
from collections.abc import Callable

NOT_UNICODE = "that is not UTF-8; see what encoding the terminal or the shell uses"


def count_of(most: int, least: int = 1) -> Callable[[str], int]:
    """What reads a whole number between two bounds, both of them allowed."""

    def count(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to {most}")
        return int(text)

    return count


def port(text: str) -> int:
    """Reads a port; 0 is a free one."""
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def duration_s(text: str) -> float:
    """Reads `45`, `90s`, `15m` or `8h`."""
    unit_s = {"s": 1, "m": 60, "h": 3_600}.get(text[-1:], 0)
    number = text[:-1] if unit_s else text
    if not number.isdecimal() or not 1 <= int(number) * (unit_s or 1) <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time from 1s to 24h, such as 15m")
    return float(int(number) * (unit_s or 1))


def is_unicode(text: str) -> bool:
    """Whether what came as bytes was UTF-8; Python keeps other bytes as what no message can have."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def words(text: str) -> str:
    """Reads what is sent or shown as it stands."""
    if not is_unicode(text):
        raise argparse.ArgumentTypeError(NOT_UNICODE)
    return text


def path(text: str) -> str:
    """Reads a path; its bytes are the file system's, whatever they mean."""
    return text
