"""A format that breaks while it is followed, with the real library: its own end, told as its own."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from services.worker.adapters.torch_loader import TorchLoader, TorchSettings
from services.worker.core.format import Format, FormatKind
from services.worker.core.sequence import Finish, Sampling
from tests.fakes import tiny_models
from tests.fixtures import tiny_tokenizer
from tests.fixtures.engine_world import Asked, engine_world

# It compiles in a millisecond, and exceeds what one step may cost after some ten letters.
BOMB = Format(FormatKind.REGEX, ("((((a{1,30}){1,30}){1,30}){1,30}){1,30}",))
TOKENS = 60


async def test_a_format_that_breaks_ends_alone_and_is_named(tmp_path: Path) -> None:
    """The plain stream beside it is that of a quiet engine."""
    spec = tiny_models.save("llama", tmp_path, speaks=True)
    loader = TorchLoader(TorchSettings(torch.device("cpu"), 1, 8, lambda: 1 << 22))
    runner = loader.load(tmp_path, spec)
    prompt = tuple(random.Random(3).choices(range(250), k=9))  # noqa: S311 - test data
    # The bias keeps the end token away, which the expression allows after each letter.
    endless = Sampling(logit_bias=((tiny_tokenizer.END, -100.0),))
    plain = Asked("plain", prompt, TOKENS, endless)
    async with engine_world(slots=4) as world:
        world.host("r", runner, tmp_path)
        alone = (await world.answer("r", [plain]))["plain"]
        found = await world.answer("r", [plain, Asked("bomb", prompt, TOKENS, endless, BOMB)])
    bomb = found["bomb"]
    assert bomb.finish is Finish.ERROR
    assert bomb.flaw.startswith("format.regex: lexer error: ")
    assert 4 < len(bomb.tokens) < TOKENS
    assert set(bomb.tokens) == set(bomb.tokens[:1])
    assert found["plain"] == alone
    assert (alone.finish, alone.flaw, len(alone.tokens)) == (Finish.LENGTH, "", TOKENS)
