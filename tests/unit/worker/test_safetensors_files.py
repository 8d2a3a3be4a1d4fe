"""Weight files: headers that lie, and files that could run code, are refused before anything is read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import ArtifactInvalid
from services.common.safetensors_files import (
    HEADER_BYTES_MAX,
    INDEX_BYTES_MAX,
    LAYERS_MAX,
    check_counts,
    check_files,
    read_config,
)
from services.worker.core.revision import RevisionFile, RevisionSpec

GOOD = {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def write(path: Path, header: Any, data: bytes) -> RevisionSpec:
    """Writes a file with this header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return RevisionSpec("m", "r", (RevisionFile(path.name, path.stat().st_size, ""),))


def test_a_true_header_passes(tmp_path: Path) -> None:
    """Metadata is allowed, and every byte is accounted for."""
    spec = write(tmp_path / "model.safetensors", {"__metadata__": {"format": "pt"}, **GOOD}, b"0" * 24)
    check_files(tmp_path, [file.path for file in spec.files])


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (GOOD, b"0" * 23),
        (GOOD, b"0" * 25),
        ({"w": {**GOOD["w"], "shape": [2, 4]}}, b"0" * 24),
        ({"w": {**GOOD["w"], "shape": [-2, -3]}}, b"0" * 24),
        ({"w": {**GOOD["w"], "dtype": "F3"}}, b"0" * 24),
        ({"w": {**GOOD["w"], "data_offsets": [8, 32]}}, b"0" * 32),
        ({"w": GOOD["w"], "v": GOOD["w"]}, b"0" * 24),
        ({"w": 5}, b""),
        ([], b""),
        (b"{", b""),
        (b"\xff", b""),
    ],
)
def test_a_lying_header_is_refused(header: Any, data: bytes, tmp_path: Path) -> None:
    """Sizes, shapes, offsets and types that do not fit each other or the file."""
    spec = write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ArtifactInvalid, match=r"model\.safetensors"):
        check_files(tmp_path, [file.path for file in spec.files])


def tensor(**fields: object) -> dict[str, object]:
    """A header of one tensor of six numbers, but for `fields`."""
    return {"w": {**GOOD["w"], **fields}}


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (tensor(data_offsets=["0", "24"]), "data_offsets"),
        (tensor(data_offsets=[None, 24]), "data_offsets"),
        (tensor(data_offsets=None), "data_offsets"),
        (tensor(data_offsets=[0.0, 24.0]), "data_offsets"),
        (tensor(data_offsets=[False, 24]), "data_offsets"),
        (tensor(data_offsets=[0, 12, 24]), "data_offsets"),
        (tensor(data_offsets="ab"), "data_offsets"),
        (tensor(data_offsets=[-24, 0]), "data_offsets"),
        (tensor(data_offsets=[24, 0]), "another size"),
        (tensor(shape=[True, 6]), "shape"),
        (tensor(shape=[2.0, 3.0]), "shape"),
        (tensor(shape=["2", "3"]), "shape"),
        (tensor(shape=None), "shape"),
        (tensor(shape={"2": 3}), "shape"),
        (tensor(shape=[1 << 64, 0]), "shape"),
        (tensor(shape=[2, 3, *[1] * 7]), "9 dimensions; at most 8"),
        (tensor(dtype=["F32"]), "dtype"),
        (tensor(dtype=None), "dtype"),
        ({"w": [2, 3]}, "no object"),
        ({"w": {}}, "dtype"),
        ({"__metadata__": {"step": 5}, **GOOD}, "'step' in `__metadata__`"),
        ({"__metadata__": {"a": {"b": "c"}}, **GOOD}, "'a' in `__metadata__`"),
        ({"__metadata__": [], **GOOD}, "`__metadata__`"),
        ({"__metadata__": None, **GOOD}, "`__metadata__`"),
        (json.dumps(GOOD).replace("24", "NaN").encode(), "NaN"),
        (json.dumps(GOOD)[:-1].encode() + b', "w": {}}', "twice"),
    ],
)
def test_an_entry_of_another_form_is_refused(header: Any, named: str, tmp_path: Path) -> None:
    """With the file and what is wrong in it: never a defect of ours, and never taken for a number."""
    write(tmp_path / "model.safetensors", header, b"0" * 24)
    with pytest.raises(ArtifactInvalid, match=r"model\.safetensors: .*" + re.escape(named)):
        check_files(tmp_path, ["model.safetensors"])


@pytest.mark.parametrize("shape", [[6], [2, 3], [1] * 6 + [2, 3]])
def test_a_tensor_has_up_to_eight_dimensions(shape: list[int], tmp_path: Path) -> None:
    """As many as anybody uses."""
    write(tmp_path / "model.safetensors", tensor(shape=shape), b"0" * 24)
    check_files(tmp_path, ["model.safetensors"])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "too short"),
        (b"\0" * 7, "too short"),
        ((200).to_bytes(8, "little") + b"{}", "longer than the file"),
        ((HEADER_BYTES_MAX + 1).to_bytes(8, "little") + b"{}", "too long"),
        # Whoever believed the length would find an object that fits the bytes that are there.
        ((90).to_bytes(8, "little") + json.dumps(tensor(shape=[0], data_offsets=[0, 0])).encode(), "longer"),
    ],
)
def test_a_header_that_the_file_does_not_have_is_refused(content: bytes, named: str, tmp_path: Path) -> None:
    """Nothing is read beyond the bound, and nothing is taken for whole that is not."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ArtifactInvalid, match=r"model\.safetensors: .*" + named):
        check_files(tmp_path, ["model.safetensors"])


def test_an_impossible_header_length_is_refused(tmp_path: Path) -> None:
    """A length beyond the format's bound is not read."""
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    spec = RevisionSpec("m", "r", (RevisionFile("model.safetensors", 64, ""),))
    with pytest.raises(ArtifactInvalid, match="too long"):
        check_files(tmp_path, [file.path for file in spec.files])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "modeling.py", "MODEL.PKL"])
def test_files_that_could_run_code_are_refused(name: str, tmp_path: Path) -> None:
    """Pickle in any guise, and Python."""
    spec = RevisionSpec("m", "r", (RevisionFile(name, 1, ""),))
    with pytest.raises(ArtifactInvalid, match="run code"):
        check_files(tmp_path, [file.path for file in spec.files])


def test_a_revision_without_weights_is_refused(tmp_path: Path) -> None:
    """There must be a safetensors file."""
    with pytest.raises(ArtifactInvalid, match="no safetensors"):
        check_files(tmp_path, [])


INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"


def indexed(directory: Path, index: object) -> list[str]:
    """Writes one shard and an index, and returns their names."""
    write(directory / SHARD, GOOD, b"0" * 24)
    (directory / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    return [INDEX, SHARD]


def test_an_index_of_the_revisions_own_files_passes(tmp_path: Path) -> None:
    """As every sharded model has it."""
    check_files(tmp_path, indexed(tmp_path, {"metadata": {"total_size": 24}, "weight_map": {"w": SHARD}}))


@pytest.mark.parametrize(
    "file",
    [
        f"../{SHARD}",
        f"./{SHARD}",
        f"/{SHARD}",
        "/etc/passwd",
        "tokenizer.json",
        INDEX,
        "other.safetensors",
        "",
        5,
        None,
        [SHARD],
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(file: object, tmp_path: Path) -> None:
    """The library joins what stands there to the directory, and unpickles what does not end as weights do."""
    (tmp_path / "r").mkdir()
    write(tmp_path / SHARD, GOOD, b"0" * 24)
    names = indexed(tmp_path / "r", {"metadata": {}, "weight_map": {"w": SHARD, "v": file}})
    with pytest.raises(ArtifactInvalid, match=r"model\.safetensors\.index\.json: `weight_map` names"):
        check_files(tmp_path / "r", names)


def test_an_index_of_any_name_is_read(tmp_path: Path) -> None:
    """`transformers_weights` in config.json makes the library read another one."""
    names = indexed(tmp_path, {"weight_map": {"w": SHARD}})
    (tmp_path / f"x.{INDEX}").write_text('{"weight_map": {"w": "../w.pt"}}')
    with pytest.raises(ArtifactInvalid, match=rf"x\.{INDEX}"):
        check_files(tmp_path, [*names, f"x.{INDEX}"])


@pytest.mark.parametrize(
    "index",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, " " * (INDEX_BYTES_MAX + 1)],
)
def test_an_index_that_is_none_is_refused(index: str, tmp_path: Path) -> None:
    """No JSON, no map of files, too deep or too large to read."""
    names = indexed(tmp_path, index)
    with pytest.raises(ArtifactInvalid, match=r"model\.safetensors\.index\.json"):
        check_files(tmp_path, names)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"model_type": "../x"}',
        '{"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}',
        '{"model_type": "llama", "configuration_files": ["config.4.0.0.json"]}',
        "[" * 100_000,
    ],
)
def test_a_configuration_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    """Missing type, foreign code, another file to read instead, no JSON, or JSON too deep to read."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ArtifactInvalid, match=r"config\.json"):
        read_config(tmp_path)


def test_layers_are_as_many_as_tensors_and_bounded(tmp_path: Path) -> None:
    """Tensors without elements cost nothing, so that their number alone bounds nothing."""
    two = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in "ab"}
    write(tmp_path / "model.safetensors", {"__metadata__": {}, **two}, b"")
    assert check_files(tmp_path, ["model.safetensors"]) == 2
    check_counts({"num_hidden_layers": 2, "layers": [2], "depth": None, "num_labels": 2}, 2)
    check_counts({"num_hidden_layers": LAYERS_MAX}, 1 << 20)
    for layers, tensors in ((3, 2), (LAYERS_MAX + 1, 1 << 20)):
        with pytest.raises(ArtifactInvalid, match="`n_layer`"):
            check_counts({"parts": [{"n_layer": layers}]}, tensors)
