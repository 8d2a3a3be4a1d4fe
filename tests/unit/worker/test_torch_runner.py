"""The runner over real architectures: a sequence's tokens are those of transformers, whoever is beside it."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from services.common.errors import ArtifactInvalid
from services.worker.adapters import torch_loader
from services.worker.adapters.torch_loader import TorchLoader, TorchSettings, compute_dtype
from services.worker.adapters.torch_runner import TorchRunner, _without_onednn
from services.worker.core.revision import ComputeDtype, Quantization, RevisionSpec
from services.worker.core.scheduler import Limits, Scheduler
from services.worker.core.sequence import Finish, Output, Sampling, SequenceKey, SequenceStart
from services.worker.core.warmup import warm
from tests.fakes import tiny_models

Make = Callable[..., tuple[RevisionSpec, Path]]


def loader(kv_bytes: int = 1 << 24) -> TorchLoader:
    """A loader for this machine, with a small cache."""
    return TorchLoader(TorchSettings(torch.device("cpu"), threads=1, slots=8, kv_bytes=lambda: kv_bytes))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, TorchRunner]]:
    """Makes each tiny model once."""
    made: dict[str, tuple[Path, TorchRunner]] = {}

    def make(name: str) -> tuple[Path, TorchRunner]:
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            spec = tiny_models.save(name, directory)
            loader().verify(directory, spec)
            made[name] = directory, loader().load(directory, spec)
        return made[name]

    return make


def prompts(lengths: Sequence[int], seed: int = 1) -> list[tuple[int, ...]]:
    """Random prompts of these lengths."""
    draw = random.Random(seed)  # noqa: S311 - test data
    return [tuple(draw.randrange(3, tiny_models.VOCABULARY) for _ in range(length)) for length in lengths]


def start(number: int, prompt: Sequence[int], tokens: int, **more: Any) -> SequenceStart:
    """A sequence with enough credit."""
    return SequenceStart(SequenceKey(1, str(number)), tuple(prompt), tokens, credit_tokens=10_000, **more)


def run(
    runner: TorchRunner, starts: Sequence[SequenceStart], *, arrivals: Sequence[int] = (), slots: int = 8
) -> dict[str, list[int]]:
    """Runs sequences together, each from its arrival step on; returns their tokens by job."""
    limits = Limits(slots, runner.facts.kv_tokens, chunk_tokens=32, shared_chunk_tokens=16)
    scheduler = Scheduler(limits, runner.facts.end_ids)
    found: dict[str, list[int]] = {one.key.job: [] for one in starts}
    waiting = list(zip(arrivals or [0] * len(starts), starts, strict=True))
    step = 0
    while waiting or scheduler.running:
        for arrival, one in tuple(waiting):
            if arrival <= step and scheduler.fits(one):
                scheduler.admit(one)
                waiting.remove((arrival, one))
        step += 1
        if (batch := scheduler.schedule()) is not None:
            collect(found, scheduler.apply(runner.step(batch)))
    return found


def collect(found: dict[str, list[int]], outputs: Sequence[Output]) -> None:
    """Adds what a step produced."""
    for output in outputs:
        assert output.finish is not Finish.ERROR
        found[output.key.job].extend(output.token_ids)


def reference(directory: Path, prompt: Sequence[int], tokens: int, **settings: Any) -> list[int]:
    """What transformers generates greedily, up to the end token."""
    factory: Any = transformers.AutoModelForCausalLM
    module = factory.from_pretrained(directory, dtype=torch.float32)
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        whole = module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            **settings,
        )
    answer = [int(token) for token in whole[0, len(prompt) :]]
    return answer[: answer.index(2)] if 2 in answer else answer


@pytest.mark.parametrize("name", sorted(tiny_models.CONFIGS))
def test_mixed_lengths_together_equal_transformers(
    name: str, model: Callable[[str], tuple[Path, TorchRunner]]
) -> None:
    """Greedy fp32: each of several requests that join and leave equals generate, token for token."""
    directory, runner = model(name)
    asked = prompts([1, 5, 17, 40, 70])
    starts = [start(number, prompt, 12 + 3 * number) for number, prompt in enumerate(asked)]
    found = run(runner, starts, arrivals=[0, 3, 1, 5, 2])
    for number, prompt in enumerate(asked):
        assert found[str(number)] == reference(directory, prompt, 12 + 3 * number)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.9, 20, 0.9, 0.02, seed=7),
        Sampling(repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.4),
        Sampling(1.1, seed=7, frequency_penalty=-0.5, logit_bias=((5, 3.0), (9, -50.0))),
    ],
    ids=["greedy", "seeded", "penalized", "biased"],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_cut_and_continued_equals_uncut(
    name: str, sampling: Sampling, model: Callable[[str], tuple[Path, TorchRunner]]
) -> None:
    """At whatever token a sequence is cut, another run goes on as if nothing had happened."""
    _, runner = model(name)
    (prompt,) = prompts([21], seed=5)
    whole = run(runner, [start(0, prompt, 30, sampling=sampling)])["0"]
    others = [start(9, prompts([33])[0], 30, sampling=Sampling(1.0, seed=1))]
    for cut in (1, len(whole) // 2, len(whole) - 1):
        rest = start(0, prompt, 30, sampling=sampling, emitted_ids=tuple(whole[:cut]))
        assert run(runner, [*others, rest])["0"] == whole[cut:]


def test_repetition_penalty_and_bias_equal_transformers(
    model: Callable[[str], tuple[Path, TorchRunner]],
) -> None:
    """Greedy with both, in a batch with others: the tokens that generate yields with the same settings."""
    directory, runner = model("llama")
    sampling = Sampling(repetition_penalty=1.4, logit_bias=((5, 4.0), (40, -3.0)))
    asked = prompts([9, 25])
    starts = [start(number, prompt, 20, sampling=sampling) for number, prompt in enumerate(asked)]
    found = run(runner, [*starts, start(9, prompts([12])[0], 20)])
    bias = {(5,): 4.0, (40,): -3.0}
    for number, prompt in enumerate(asked):
        wanted = reference(directory, prompt, 20, repetition_penalty=1.4, sequence_bias=bias)
        assert found[str(number)] == wanted


def test_a_seeded_sequence_does_not_depend_on_its_neighbours(
    model: Callable[[str], tuple[Path, TorchRunner]],
) -> None:
    """Alone, beside greedy ones, and beside others with the same seed the tokens are the same."""
    _, runner = model("llama")
    mine, *others = prompts([11, 11, 30, 4])
    sampling = Sampling(temperature=1.2, top_p=0.95, seed=99)
    alone = run(runner, [start(0, mine, 25, sampling=sampling)])["0"]
    beside = [
        start(number + 1, prompt, 25, sampling=sampling if number % 2 else Sampling())
        for number, prompt in enumerate(others)
    ]
    assert run(runner, [*beside, start(0, mine, 25, sampling=sampling)])["0"] == alone


def test_one_answer_never_reaches_another(model: Callable[[str], tuple[Path, TorchRunner]]) -> None:
    """Rows are reused many times over; each answer equals its own run alone."""
    _, runner = model("llama")
    asked = prompts([3, 50, 8, 20, 1, 64, 9, 33, 12, 5], seed=3)
    starts = [start(number, prompt, 3 + number) for number, prompt in enumerate(asked)]
    together = run(runner, starts, slots=3)
    for one in starts:
        assert run(runner, [one])[one.key.job] == together[one.key.job]


def test_the_cache_stays_inside_its_budget(tmp_path: Path) -> None:
    """However sequences come, the tensors never exceed the bytes that were given."""
    spec = tiny_models.save("llama", tmp_path)
    runner = loader(kv_bytes=512 * 200).load(tmp_path, spec)
    assert runner.facts.kv_tokens <= 512 * 200 // runner.kv_bytes_per_token
    starts = [start(number, prompt, 20) for number, prompt in enumerate(prompts([2, 30, 5, 60, 9, 18]))]
    run(runner, starts)
    assert 0 < runner._cache.held_bytes <= 512 * 200


@pytest.mark.parametrize("kv_bytes", [0, 512 * 15], ids=["none", "less than a bucket"])
def test_a_cache_that_holds_no_sequence_is_told_at_the_load(tmp_path: Path, kv_bytes: int) -> None:
    """With what to do: nothing could ever be served from it."""
    spec = tiny_models.save("llama", tmp_path)
    with pytest.raises(ArtifactInvalid, match=r"not even 16 tokens .* set kv_cache_bytes"):
        loader(kv_bytes).load(tmp_path, spec)


def test_a_cache_for_one_sequence_warms_up(tmp_path: Path) -> None:
    """One bucket is the least that serves."""
    runner = loader(512 * 31).load(tmp_path, tiny_models.save("llama", tmp_path))
    assert runner.facts.kv_tokens == 16
    warm(runner)


@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.NF4, Quantization.FP4])
def test_a_quantized_revision_generates_close_to_the_plain_one(
    quantization: Quantization, tmp_path: Path
) -> None:
    """Quantized weights warm up, take less memory, and agree with plain ones in most first tokens."""
    plain_spec = tiny_models.save("llama", tmp_path)
    plain = loader().load(tmp_path, plain_spec)
    spec = tiny_models.spec_of(tmp_path, quantization, ComputeDtype.AUTO)
    runner = loader().load(tmp_path, spec)
    warm(runner)
    assert runner.facts.weights_bytes < plain.facts.weights_bytes
    starts = [start(number, prompt, 1) for number, prompt in enumerate(prompts([9] * 16, seed=8))]
    wanted, found = run(plain, starts), run(runner, starts)
    agreeing = sum(wanted[job] == found[job] for job in wanted)
    assert agreeing >= (12 if quantization is Quantization.INT8 else 4)


def test_dtypes_follow_the_quantization() -> None:
    """int8 on CPU computes in fp32 whatever is asked; four-bit in bf16; plain as asked."""
    cpu = torch.device("cpu")
    spec = RevisionSpec("m", "r", quantization=Quantization.INT8, compute_dtype=ComputeDtype.BF16)
    assert compute_dtype(spec, cpu) is torch.float32
    assert compute_dtype(RevisionSpec("m", "r", quantization=Quantization.NF4), cpu) is torch.bfloat16
    asked = RevisionSpec("m", "r", quantization=Quantization.NONE, compute_dtype=ComputeDtype.FP32)
    assert compute_dtype(asked, cpu) is torch.float32


@pytest.mark.parametrize(
    "config",
    [
        transformers.T5Config(),
        transformers.MambaConfig(num_hidden_layers=2),
        transformers.BertConfig(num_hidden_layers=2),
        transformers.BloomConfig(),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures_are_refused_by_name(config: Any, tmp_path: Path) -> None:
    """What is no decoder with attention over positions is refused at prepare, and the message names it."""
    spec = tiny_models.save("llama", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(ArtifactInvalid, match=config.model_type):
        loader().verify(tmp_path, spec)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_hidden_layers": 22}, "num_hidden_layers"),
        ({"model_type": "gemma2", "num_hidden_layers": 10**11}, "num_hidden_layers"),
        ({"model_type": "gpt2", "n_layer": 10**11}, "n_layer"),
        ({"text_config": {"num_layers": 10**11}}, "num_layers"),
        ({"num_labels": 10**11}, "num_labels"),
        ({"id2label": {str(number): "x" for number in range(5_000)}}, "id2label"),
    ],
)
def test_more_layers_or_labels_than_can_be_are_refused(
    fields: dict[str, Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the library reads the configuration: it would fill the memory with as many."""
    spec = tiny_models.save("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    monkeypatch.delattr(torch_loader, "AutoConfig")
    with pytest.raises(ArtifactInvalid, match=rf"config\.json: `{named}`"):
        loader().verify(tmp_path, spec)


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize(("asked", "served"), [(0, False), (65, False), (64, True)])
def test_longrope_is_served_as_far_as_its_short_factors_go(
    key: str, asked: int, tmp_path: Path, *, served: bool
) -> None:
    """Beyond, one long row of a pass would turn the keys of all others by other factors."""
    spec = replace(tiny_models.save("llama", tmp_path), context_tokens=asked)
    factors: dict[str, object] = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    fields = {
        "rope_scaling": {key: "longrope", **factors},
        "original_max_position_embeddings": 64,
        "model_type": "phi3",
    }
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    if served:
        loader().verify(tmp_path, spec)
        return
    with pytest.raises(ArtifactInvalid, match=r"longrope .* at most 64"):
        loader().verify(tmp_path, spec)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    """A configuration that does not fit the weights ends in ArtifactInvalid, without a path."""
    spec = tiny_models.save("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    with pytest.raises(ArtifactInvalid) as caught:
        loader().load(tmp_path, spec)
    assert str(tmp_path) not in caught.value.message


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """NaN weights never serve."""
    spec = tiny_models.save("llama", tmp_path)
    factory: Any = transformers.AutoModelForCausalLM
    module = factory.from_pretrained(tmp_path)
    module.model.norm.weight.data.fill_(float("nan"))
    module.save_pretrained(tmp_path)
    with pytest.raises(ArtifactInvalid, match="finite"):
        loader().load(tmp_path, spec)


def test_threads_that_go_without_onednn_leave_it_as_the_first_found_it() -> None:
    """A warm-up begins before a step of the stream beside it, and ends before it does."""
    onednn: Any = torch.backends.mkldnn
    found = onednn.enabled
    begun, ended = threading.Event(), threading.Event()

    def warm_up() -> None:
        with _without_onednn():
            begun.set()
            ended.wait(10)

    try:
        for before in (True, False):
            onednn.set_flags(_enabled=before, _fp32_precision=None)
            begun.clear()
            ended.clear()
            thread = threading.Thread(target=warm_up)
            thread.start()
            assert begun.wait(10)
            with _without_onednn():
                ended.set()
                thread.join(10)
                assert not onednn.enabled
            assert onednn.enabled == before
    finally:
        onednn.set_flags(_enabled=found, _fp32_precision=None)
