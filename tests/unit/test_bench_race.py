"""The benches, whole, on tiny random models."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import engine, quality
from bench.race import own_engine
from bench.race.contestant import Entry, open_runner
from bench.race.gguf_file import NotConvertible, write_q8_0
from bench.race.llama_server import LlamaServer
from bench.race.own_engine import Machine
from bench.race.work import Work, decode_rate
from tests.fakes import llama_server, tiny_models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    tiny_models.save("llama", directory, speaks=True)
    return directory


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A llama.cpp server that is none."""
    path = tmp_path / "llama-server"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{llama_server.__file__}" "$@"\n')
    path.chmod(0o700)
    return path


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Loading sets what libraries read; other tests must not find it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("kind", ["int8", "bf16", *engine.PEERS])
def test_every_contestant_does_the_work(kind: str, model: Path) -> None:
    """All answer all prompts with as many tokens as were asked for, twice over, and end cleanly."""
    runner = open_runner(Entry(kind, str(model), Machine("cpu", 1, 2, 1 << 24), 256))
    try:
        for prompts in (((20, 30, 40),), ((20, 30, 40), (50, 60, 70))):
            work = Work(prompts, 6)
            runner.run(work).check(work)
    finally:
        runner.close()


def test_gathered_sequences_decode_together(model: Path) -> None:
    """However slowly prompts are read, all sequences decode from the last first token to the end."""
    machine = Machine("cpu", 1, 2, 1 << 24)
    runner = own_engine.load(model, own_engine.MODES["fp32"], machine)
    work = Work((tuple(range(20, 80)), (30, 40)), 6)
    trace = own_engine.OwnEngine(runner).run_gathered(work)
    runner.close()
    trace.check(work)
    firsts, seconds = ([answer[place] for answer in trace.arrivals_s] for place in (0, 1))
    assert max(firsts) <= min(seconds)
    assert decode_rate(trace) > 0


def test_a_race_runs_and_its_report_is_written(
    model: Path, program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One quick run with processes as contestants: every figure, the ratios, and all three reports."""
    document, file = tmp_path / "benchmarks.md", tmp_path / "report.json"
    options = ["--quick", "--quantization", "int8", "--peers", "--threads", "1"]
    options += ["--llama-server", str(program), "--json", str(file), "--write", str(document)]
    engine.main([str(model), *options])
    report = json.loads(file.read_text())
    assert report["notes"] == []
    assert list(report["load_s"]) == ["int8", "llama.cpp"]
    for row in report["samples"]:
        assert row["tokens_per_s"] > 0
        assert row["peak_bytes"] >= row["resident_bytes"] > 1_000_000
    measured = {finding["text"] for finding in report["ratios"] if finding["ratio"] is not None}
    assert "decode tokens/s: int8 at 1 to llama.cpp at 1" in measured
    assert any(text.startswith("TTFT") for text in measured)
    assert "<!-- bench.engine: begin -->" in document.read_text()
    assert "| llama.cpp | 2 |" in capsys.readouterr().out


def test_without_a_llama_server_the_report_says_so(model: Path, program: Path, tmp_path: Path) -> None:
    """Neither an absent peer nor one that cannot start is passed over in silence."""
    options = [str(model), "--quick", "--quantization", "--peers"]
    with pytest.raises(SystemExit, match="give its server with --llama-server"):
        engine.main(options)
    program.write_text("#!/bin/sh\necho no such library\nexit 1\n")
    file = tmp_path / "model.gguf"
    with pytest.raises(SystemExit, match="no such library"):
        engine.main([*options, "--llama-server", str(program), "--gguf", str(file)])


def test_quality_scores_every_mode_and_compares_answers(model: Path, tmp_path: Path) -> None:
    """Exact modes agree with themselves in a batch and continued; perplexity is measured of each mode."""
    file, document = tmp_path / "quality.json", tmp_path / "benchmarks.md"
    modes = ["fp32", "int8", "int8-bitsandbytes", "nf4"]
    quality.main(
        [
            str(model),
            "--quick",
            "--modes",
            *modes,
            "--json",
            str(file),
            "--write",
            str(document),
            "--threads",
            "1",
        ]
    )
    found = {row["mode"]: row for row in json.loads(file.read_text())}
    assert list(found) == modes
    for mode in ("fp32", "int8"):
        assert found[mode]["alike_in_batch"] == found[mode]["alike_continued"] == 1.0
    assert found["nf4"]["perplexity"] != found["fp32"]["perplexity"] > 1
    assert "| fp32 |" in document.read_text()
    assert "to that of bitsandbytes' own modules" in document.read_text()


@pytest.fixture
def server(program: Path, tmp_path: Path) -> Iterator[LlamaServer]:
    """A running server."""
    one = LlamaServer(program, tmp_path / "model.gguf", slots=2, context_tokens=256, threads=1)
    yield one
    one.close()


def test_streams_of_a_llama_server_are_read_to_the_token(server: LlamaServer) -> None:
    """Chunks are no events, and an event may hold several tokens."""
    work = Work(((5,), (50,)), 4)
    assert server.answer(work) == [[6, 7, 8, 9], [51, 52, 53, 54]]
    server.run(work).check(work)


def test_a_refusal_of_a_llama_server_is_told(server: LlamaServer) -> None:
    """It is an error, not an empty answer."""
    with pytest.raises(RuntimeError, match="400"):
        server.run(Work(((5,),), 2_000))


def test_a_written_gguf_file_holds_the_same_weights(model: Path, tmp_path: Path) -> None:
    """An independent reader makes a model of it whose logits are those of the original, but for rounding."""
    import torch  # noqa: PLC0415 - heavy, and wanted here alone
    from transformers import AutoModelForCausalLM, GgufConfig  # noqa: PLC0415 - as above

    write_q8_0(model, tmp_path / "model.gguf")
    ids = torch.arange(20, 40).unsqueeze(0)
    with torch.inference_mode():
        original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
        written = AutoModelForCausalLM.from_pretrained(
            tmp_path,
            gguf_file="model.gguf",
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )(ids).logits
    # Queries or keys in another order would leave nothing of it.
    agreement = torch.nn.functional.cosine_similarity(original, written, dim=-1)
    assert agreement.min() > 0.95


def test_other_families_are_not_written_as_gguf(tmp_path: Path) -> None:
    """A file that llama.cpp would misread is worse than none."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(NotConvertible, match="gpt2"):
        write_q8_0(tmp_path, tmp_path / "model.gguf")
