"""Stored forms: weights are made once on a host, mapped by every later start, and say the same things."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from services.common import artifacts
from services.worker.adapters import mapped_tensors, module_weights
from services.worker.adapters.lean_runner import LeanRunner
from services.worker.adapters.stored_forms import StoredForms
from services.worker.adapters.torch_loader import TorchLoader, TorchSettings
from services.worker.adapters.torch_runner import TorchRunner
from services.worker.adapters.weight_source import Way, _key
from services.worker.core.batch import Batch, Chunk, Decode, Draw
from services.worker.core.ports import LoadWatch
from services.worker.core.revision import (
    ComputeDtype,
    LoadHalted,
    LoadStage,
    Quantization,
    RevisionFile,
    RevisionSpec,
)
from services.worker.core.sequence import Sampling
from tests.fakes import tiny_models

PROMPT = tuple(range(3, 40))
BYTES_MAX = 1 << 30

Model = tuple[Path, RevisionSpec]


def made(directory: Path, name: str = "llama") -> Model:
    """A tiny model with its true digests."""
    directory.mkdir()
    spec = tiny_models.save(name, directory)
    files = [RevisionFile(one.path, one.size_bytes, one.sha256) for one in artifacts.describe(directory)]
    return directory, replace(spec, files=tuple(files))


def load(
    model: Model, forms: Path | None, *, lean: bool = True, watch: LoadWatch | None = None
) -> TorchRunner:
    """A runner of a model, over forms that lie in a directory."""
    store = None if forms is None else StoredForms(forms, BYTES_MAX)
    settings = TorchSettings(torch.device("cpu"), 1, 4, lambda: 1 << 24, lean, store)
    return TorchLoader(settings).load(*model, *([] if watch is None else [watch]))


def logits(runner: TorchRunner) -> torch.Tensor:
    """What a runner says to a prompt."""
    with torch.inference_mode():
        runner.step(Batch(1, 64, (), (), ()))
        return runner.prefill(Chunk(0, 0, PROMPT, None)).clone()


def only_file(forms: Path, pattern: str) -> Path:
    """The one file of this kind in all forms."""
    (found,) = forms.glob(f"*/{pattern}")
    return found


@pytest.mark.parametrize(
    ("name", "quantization", "dtype", "lean"),
    [
        ("llama", Quantization.NONE, ComputeDtype.BF16, True),
        ("llama", Quantization.NONE, ComputeDtype.FP32, True),
        ("llama", Quantization.INT8, ComputeDtype.AUTO, True),
        ("qwen2", Quantization.INT8, ComputeDtype.AUTO, True),
        ("qwen3", Quantization.INT8, ComputeDtype.AUTO, True),
        ("llama", Quantization.NF4, ComputeDtype.BF16, True),
        ("llama", Quantization.FP4, ComputeDtype.BF16, True),
        ("llama", Quantization.NF4, ComputeDtype.FP32, True),
        ("llama", Quantization.INT8, ComputeDtype.AUTO, False),
        ("gpt2", Quantization.NF4, ComputeDtype.BF16, True),
        ("gpt2", Quantization.INT8, ComputeDtype.AUTO, True),
        ("gemma", Quantization.NONE, ComputeDtype.BF16, True),
        ("phi", Quantization.NONE, ComputeDtype.FP32, True),
    ],
)
def test_a_mapped_start_says_what_the_first_one_said(
    name: str,
    quantization: Quantization,
    dtype: ComputeDtype,
    lean: bool,  # noqa: FBT001 - a parameter
    tmp_path: Path,
) -> None:
    """Bit for bit, where the form was just made and where it was found; without a store, up to rounding.

    The library's products in single precision depend on where in memory a weight begins; ours do not.
    """
    directory, spec = made(tmp_path / "model", name)
    model = directory, replace(spec, quantization=quantization, compute_dtype=dtype)
    plain = load(model, None, lean=lean)
    said = [logits(plain)]
    stages: list[list[LoadStage]] = [[], []]
    for told in stages:

        def watch(stage: LoadStage, done: int, total: int, told: list[LoadStage] = told) -> None:
            assert 0 <= done <= total or not total
            told.append(stage)

        runner = load(model, tmp_path / "forms", lean=lean, watch=watch)
        said.append(logits(runner))
        assert runner.facts.end_ids == plain.facts.end_ids
    assert torch.equal(said[1], said[2])
    assert torch.allclose(said[0], said[1], rtol=1e-3, atol=1e-3)
    if isinstance(plain, LeanRunner) and quantization is Quantization.INT8:
        assert torch.equal(said[0], said[1])
    assert LoadStage.QUANTIZE in stages[0]
    # Weights that the library maps as they are need no form.
    stored = (tmp_path / "forms").exists()
    assert stored is not (name == "phi")
    assert not stored or set(stages[1]) == {LoadStage.MAP}


def anonymous_kb(path: Path) -> int:
    """Memory of this process that was copied from a mapped file; raises where it has not mapped it."""
    blocks = Path("/proc/self/smaps").read_text().split(f"{path}\n")[1:]
    assert blocks
    return sum(int(block.split("Anonymous:")[1].split()[0]) for block in blocks)


@pytest.mark.parametrize("quantization", [Quantization.NONE, Quantization.INT8, Quantization.NF4])
def test_mapped_weights_are_never_copied(quantization: Quantization, tmp_path: Path) -> None:
    """After prefill and decode all pages of the form are still the file's, which workers share."""
    directory, spec = made(tmp_path / "model")
    model = directory, replace(spec, quantization=quantization, compute_dtype=ComputeDtype.BF16)
    load(model, tmp_path / "forms")
    runner = load(model, tmp_path / "forms")
    logits(runner)
    with torch.inference_mode():
        runner.decode([Decode(0, len(PROMPT), 5, Draw(Sampling(), 0, 0))])
    files = [*(tmp_path / "forms").glob("*/*.safetensors")]
    assert {anonymous_kb(file) for file in files} == {0}


def truncate(forms: Path) -> None:
    """Cuts the weights short."""
    path = only_file(forms, "*.safetensors")
    os.truncate(path, path.stat().st_size - 1)


def lie(forms: Path) -> None:
    """Changes a shape in the header."""
    path = only_file(forms, "*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"[64]", b"[32]", 1))


def lose(forms: Path) -> None:
    """Removes the weights."""
    only_file(forms, "*.safetensors").unlink()


def garble(forms: Path) -> None:
    """Leaves an index that is no JSON."""
    only_file(forms, "form.json").write_text("{")


def overwrite(forms: Path) -> None:
    """Spoils the weights behind a header that is right."""
    path = only_file(forms, "*.safetensors")
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.seek(1 << 20)
        stream.write(b"\x55" * (size - (1 << 20)))


@pytest.mark.parametrize("damage", [truncate, lie, lose, garble, overwrite])
def test_a_damaged_form_is_made_again(damage: Callable[[Path], None], tmp_path: Path) -> None:
    """Whatever is wrong with it, the next start discards it and serves what it should."""
    directory, spec = made(tmp_path / "model")
    model = directory, replace(spec, quantization=Quantization.INT8)
    forms = tmp_path / "forms"
    wanted = logits(load(model, forms))
    damage(forms)
    stages: list[LoadStage] = []
    again = load(model, forms, watch=lambda stage, _done, _total: stages.append(stage))
    assert torch.equal(logits(again), wanted)
    assert LoadStage.QUANTIZE in stages
    assert torch.equal(logits(load(model, forms)), wanted)


@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.NF4])
def test_a_halted_load_leaves_nothing(quantization: Quantization, tmp_path: Path) -> None:
    """What the watch raises ends the load half way, and the next one is none the wiser."""
    directory, spec = made(tmp_path / "model")
    model = directory, replace(spec, quantization=quantization)
    forms = tmp_path / "forms"
    told: list[int] = []

    def halt(_stage: LoadStage, done: int, total: int) -> None:
        told.append(done)
        if 0 < done < total:
            raise LoadHalted

    with pytest.raises(LoadHalted):
        load(model, forms, watch=halt)
    assert len(told) > 1
    assert not [*forms.iterdir()]
    assert torch.isfinite(logits(load(model, forms))).all()


def test_another_revision_or_way_has_another_form(tmp_path: Path) -> None:
    """Other weights, another quantization or number format never meet in one form."""
    forms = tmp_path / "forms"
    directory, spec = made(tmp_path / "one")
    for one in (Quantization.NONE, Quantization.INT8, Quantization.NF4):
        load((directory, replace(spec, quantization=one)), forms)
    load((directory, replace(spec, compute_dtype=ComputeDtype.BF16)), forms)
    (tmp_path / "two").mkdir()
    tiny_models.save("llama", tmp_path / "two", seed=5)
    files = tuple(RevisionFile(f.path, f.size_bytes, f.sha256) for f in artifacts.describe(tmp_path / "two"))
    load((tmp_path / "two", replace(spec, files=files)), forms)
    assert len([*forms.iterdir()]) == 5


@pytest.mark.parametrize("lean", [True, False])
def test_revisions_that_differ_in_their_index_have_other_forms(*, lean: bool) -> None:
    """It says which file a tensor is read from."""
    way = Way(Quantization.INT8, torch.float32, torch.device("cpu"), lean)

    def key(index: str) -> str:
        names = ("a.safetensors", "config.json", "model.safetensors.index.json", "tokenizer.json")
        digests = ("1" * 64, "2" * 64, index * 64, "3" * 64)
        files = (RevisionFile(name, 1, digest) for name, digest in zip(names, digests, strict=True))
        return _key(RevisionSpec("m", "r", tuple(files)), way)

    assert key("4") == key("4")
    assert key("4") != key("5")


def test_without_digests_or_a_disk_nothing_is_stored(tmp_path: Path) -> None:
    """A revision that has no name to be found by, or nowhere to be kept, is served all the same."""
    directory, spec = made(tmp_path / "model")
    nameless = replace(spec, files=tuple(replace(file, sha256="0" * 64) for file in spec.files))
    wanted = logits(load((directory, spec), None))
    assert torch.equal(logits(load((directory, nameless), tmp_path / "forms")), wanted)
    assert not (tmp_path / "forms").exists()
    (tmp_path / "file").write_text("in the way")
    assert torch.equal(logits(load((directory, spec), tmp_path / "file" / "forms")), wanted)


def test_a_module_that_finds_the_disk_full_is_served_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library that writes its weights says so with an error of its own."""
    directory, spec = made(tmp_path / "model")
    model, forms = (directory, replace(spec, quantization=Quantization.NF4)), tmp_path / "forms"
    wanted = logits(load(model, None))

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    assert torch.equal(logits(load(model, forms)), wanted)
    assert [path for path in forms.iterdir() if path.is_dir()] == []


def write(content: bytes) -> Callable[[Path], None]:
    """Makes a form of one small file."""

    def make(directory: Path) -> None:
        (directory / "notes.json").write_bytes(content)

    return make


def test_of_several_that_want_a_form_one_makes_it(tmp_path: Path) -> None:
    """The others wait, and find it."""
    begun, go, waited = threading.Event(), threading.Event(), threading.Event()
    calls: list[int] = []

    def make(directory: Path) -> None:
        calls.append(1)
        begun.set()
        assert go.wait(10)
        write(b"1")(directory)

    found: list[Path] = []

    def obtain() -> None:
        found.append(StoredForms(tmp_path, BYTES_MAX).obtain("key", make, waited.set))

    threads = [threading.Thread(target=obtain) for _ in range(3)]
    threads[0].start()
    assert begun.wait(10)
    for thread in threads[1:]:
        thread.start()
    assert waited.wait(10)
    go.set()
    for thread in threads:
        thread.join(10)
    assert calls == [1]
    assert found == [tmp_path / "key"] * 3


def test_what_a_dead_maker_left_is_removed(tmp_path: Path) -> None:
    """A process that was killed while it made a form leaves a directory that the next maker clears."""
    (tmp_path / ".building-1").mkdir()
    (tmp_path / ".building-1" / "half").write_text("x")
    StoredForms(tmp_path, BYTES_MAX).obtain("key", write(b"1"), lambda: None)
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_the_least_recently_used_forms_go_first(tmp_path: Path) -> None:
    """Beyond the bound the oldest use is given up; what was asked for stays even if it alone is too large."""
    forms = StoredForms(tmp_path, 2_600)
    for at, key in enumerate("abc"):
        path = forms.obtain(key, write(b"x" * 1_000), lambda: None)
        os.utime(path / "form.json", (at + 1, at + 1))
        if key == "b":
            # Used again: it is younger than the next one then.
            os.utime(path / "form.json", (9, 9))
    assert {path.name for path in tmp_path.iterdir()} == {"b", "c"}
    forms.obtain("d", write(b"x" * 9_000), lambda: None)
    assert {path.name for path in tmp_path.iterdir()} == {"d"}


@pytest.mark.parametrize(
    ("reader", "name", "quantization"),
    [(mapped_tensors, "read", Quantization.INT8), (module_weights, "read_stored", Quantization.NF4)],
    ids=["lean", "module"],
)
def test_a_form_that_another_worker_removes_in_the_meantime_is_made_again(
    reader: ModuleType, name: str, quantization: Quantization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look for it and its opening: the revision is not to blame for it."""
    directory, spec = made(tmp_path / "model")
    model, forms = (directory, replace(spec, quantization=quantization)), tmp_path / "forms"
    expected, read, times = logits(load(model, forms)), getattr(reader, name), [2]

    def removed(path: Path, *rest: Any) -> Any:
        times[0] -= 1
        if times[0] > 0:
            shutil.rmtree(path if path.is_dir() else path.parent)
        return read(path, *rest)

    monkeypatch.setattr(reader, name, removed)
    assert torch.equal(logits(load(model, forms)), expected)
    assert times == [0]
    # Where that happens again and again, nothing is mapped.
    times[0] = 9
    assert torch.equal(logits(load(model, forms)), expected)
    assert times == [7]


def test_a_modules_form_that_cannot_be_read_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no header tells of the damage, the disk does; later starts map what was made then."""
    directory, spec = made(tmp_path / "model")
    model, forms = (directory, replace(spec, quantization=Quantization.NF4)), tmp_path / "forms"
    expected, read = logits(load(model, forms)), module_weights.read_stored
    (form,) = (path for path in forms.iterdir() if path.is_dir())
    damaged = form.stat().st_ino

    def on_a_bad_disk(path: Path, *rest: Any) -> Any:
        if path.stat().st_ino == damaged:
            raise OSError(errno.EIO, "Input/output error")
        return read(path, *rest)

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(module_weights, "read_stored", on_a_bad_disk)
    with monkeypatch.context() as disk:
        # Such a disk is taken out of use for writing; the revision is served all the same.
        disk.setattr(Path, "unlink", read_only)
        assert torch.equal(logits(load(model, forms)), expected)
        assert form.stat().st_ino == damaged
    assert torch.equal(logits(load(model, forms)), expected)
    assert form.stat().st_ino != damaged
