"""The lean forward: what the library computes, and bits that do not depend on who else is computed."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from services.worker.adapters.fused_runner import FusedRunner
from services.worker.adapters.lean_decoder import Heads, attend
from services.worker.adapters.lean_runner import LeanRunner
from services.worker.adapters.torch_loader import TorchLoader, TorchSettings
from services.worker.adapters.torch_runner import TorchRunner
from services.worker.core.batch import Batch, Chunk, Decode, Draw
from services.worker.core.revision import ComputeDtype, Quantization
from services.worker.core.sequence import Sampling, SequenceStart
from tests.fakes import tiny_models
from tests.unit.worker.test_torch_runner import prompts, run, start

NAMES = ["llama", "mistral-full", "qwen2", "qwen3", "llama-wide"]
ROWS = 32


def load(directory: Path, quantization: Quantization, threads: int = 1, *, lean: bool = True) -> TorchRunner:
    """A runner over the tiny model in a directory."""
    settings = TorchSettings(torch.device("cpu"), threads, ROWS, lambda: 1 << 26, lean)
    spec = tiny_models.spec_of(directory, quantization, ComputeDtype.FP32)
    return TorchLoader(settings).load(directory, spec)


@pytest.fixture(scope="module", params=NAMES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each kind."""
    made = tmp_path_factory.mktemp(request.param)
    tiny_models.save(request.param, made)
    return made


def fill(runner: TorchRunner, row: int, ids: tuple[int, ...], pieces: tuple[int, ...] = ()) -> torch.Tensor:
    """Prefills a row in pieces; returns the last logits."""
    logits = torch.empty(0)
    places = [0, *pieces, len(ids)]
    for first, last in itertools.pairwise(places):
        logits = runner.prefill(Chunk(row, first, ids[first:last], None))
    return logits


def reserve(runner: TorchRunner, capacity: int) -> None:
    """Makes all rows, with this many positions."""
    runner.step(Batch(ROWS, capacity, (), (), ()))


@pytest.mark.parametrize("threads", [1, 2])
def test_int8_logits_do_not_depend_on_batch_or_bucket(directory: Path, threads: int) -> None:
    """Bit for bit: alone, among 2, 8 and 32, beside a row that is as short or far longer."""
    runner = load(directory, Quantization.INT8, threads)
    draw = Draw(Sampling(), 0, 0)
    with torch.inference_mode():
        reserve(runner, 400)
        asked = prompts([9 + number % 5 for number in range(ROWS - 1)] + [290])
        for row, ids in enumerate(asked):
            fill(runner, row, ids)
        decodes = [Decode(row, len(ids), ids[0], draw) for row, ids in enumerate(asked)]
        alone = [runner.decode([decode]) for decode in decodes]
        for count in (2, 3, 8, 31, 32):
            together = runner.decode(decodes[:count])
            for row in range(count):
                assert torch.equal(together[row], alone[row][0])
        scattered = runner.decode([decodes[0], decodes[5], decodes[31]])
        assert torch.equal(scattered[1], alone[5][0])


def test_int8_logits_do_not_depend_on_how_the_prompt_came(directory: Path) -> None:
    """Bit for bit: in one chunk, in several, or token by token as a decode does it."""
    runner = load(directory, Quantization.INT8)
    (ids,) = prompts([300])
    draw = Draw(Sampling(), 0, 0)
    with torch.inference_mode():
        reserve(runner, 400)
        whole = fill(runner, 0, ids)
        assert torch.equal(fill(runner, 1, ids, (7, 64, 65, 130, 255, 258)), whole)
        stepped = torch.empty(0)
        for position, token_id in enumerate(ids):
            stepped = runner.decode([Decode(2, position, token_id, draw)])
        assert torch.equal(stepped, whole)


@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.NONE])
def test_a_step_of_chunks_and_decodes_has_the_logits_that_each_has_apart(
    directory: Path, quantization: Quantization
) -> None:
    """Bit for bit: eight decodes, short and long, beside two chunks of prompts, of which one goes on."""
    runner, draw = load(directory, quantization), Draw(Sampling(), 0, 0)
    asked = prompts([9 + number for number in range(7)] + [290], seed=6)
    half, whole, ids_of_another = prompts([150, 40, 120], seed=7)
    chunks = (Chunk(8, 60, half[60:100], None), Chunk(9, 0, whole, draw))
    decodes = tuple(Decode(row, len(ids), ids[0], draw) for row, ids in enumerate(asked))
    rest = Chunk(8, 100, half[100:], draw)
    with torch.inference_mode():
        reserve(runner, 400)
        for row, ids in enumerate([*asked, half[:60]]):
            fill(runner, row, ids)
        runner.prefill(chunks[0])
        apart = [runner.prefill(chunks[1]), runner.decode(decodes), runner.prefill(rest)]
        for row, ids in enumerate([*asked, half[:60], ids_of_another]):
            fill(runner, row, ids)
        together, rows = runner.forward(Batch(10, 400, (), chunks, decodes))
        assert rows == [9, *range(8)]
        assert torch.equal(torch.cat([*together, runner.prefill(rest)]), torch.cat(apart))


def test_int8_requests_together_equal_each_alone(directory: Path) -> None:
    """Each of 32 mixed-length requests that run together has the tokens that it has alone."""
    runner = load(directory, Quantization.INT8)
    asked = prompts([2 + 3 * number for number in range(ROWS)], seed=4)
    starts = [start(number, prompt, 4 + number % 7) for number, prompt in enumerate(asked)]
    together = run(runner, starts, slots=ROWS, arrivals=[number // 3 for number in range(ROWS)])
    for one in starts:
        assert run(runner, [one])[one.key.job] == together[one.key.job]


def test_an_int8_seeded_sequence_goes_on_wherever_it_is_cut(directory: Path) -> None:
    """At every position another run continues with the same tokens."""
    runner = load(directory, Quantization.INT8)
    (prompt,) = prompts([21], seed=5)
    sampling = Sampling(0.9, 20, 0.95, 0.02, seed=7)
    whole = run(runner, [start(0, prompt, 16, sampling=sampling)])["0"]

    def rest(cut: int) -> SequenceStart:
        return start(0, prompt, 16, sampling=sampling, emitted_ids=tuple(whole[:cut]))

    for cut in range(1, len(whole)):
        assert run(runner, [start(9, prompt[:5], 30), rest(cut)])["0"] == whole[cut:]


@pytest.mark.parametrize("quantization", [Quantization.NONE, Quantization.INT8])
def test_the_lean_forward_agrees_with_the_library(directory: Path, quantization: Quantization) -> None:
    """Logits agree: to rounding in fp32, closely with the library's own int8."""
    lean, modules = load(directory, quantization), load(directory, quantization, lean=False)
    assert isinstance(lean, FusedRunner if quantization is Quantization.INT8 else LeanRunner)
    assert type(modules) is TorchRunner
    found = []
    for runner in (lean, modules):
        with torch.inference_mode():
            reserve(runner, 100)
            found.append(torch.cat([fill(runner, 0, ids) for ids in prompts([30, 61, 12])]))
    error = float((found[0] - found[1]).norm() / found[1].norm())
    assert error < (1e-5 if quantization is Quantization.NONE else 0.05)


def test_auto_is_int8_where_the_lean_forward_serves(tmp_path: Path) -> None:
    """`auto` on CPU holds integers for the Llama family, and plain weights for others."""
    tiny_models.save("llama", tmp_path)
    chosen = load(tmp_path, Quantization.AUTO).facts.weights_bytes
    assert chosen == load(tmp_path, Quantization.INT8).facts.weights_bytes
    assert chosen < load(tmp_path, Quantization.NONE).facts.weights_bytes
    other = tmp_path / "other"
    tiny_models.save("gemma", other)
    plain = load(other, Quantization.NONE).facts.weights_bytes
    assert load(other, Quantization.AUTO).facts.weights_bytes == plain


def test_a_long_context_is_summed_without_loss() -> None:
    """In bfloat16 a sum has eight bits: of 65,536 equal parts the second half would be lost."""
    length, heads = 65_536, Heads(queries=2, shared=1, dim=8, scale=1.0)
    keys = torch.zeros((1, length, heads.dim), dtype=torch.bfloat16)
    mask = torch.zeros((1, 1, length), dtype=torch.bfloat16)
    queries = torch.ones((1, heads.queries, heads.dim), dtype=torch.bfloat16)
    found = attend(queries, keys, torch.ones_like(keys), mask, heads)
    assert found.dtype is torch.bfloat16
    assert torch.allclose(found.float(), torch.ones(1, heads.queries * heads.dim), atol=0.01)
