"""Generates everything that is made from the protos, or checks that what is committed is fresh.

Owns: the stubs beside the `.proto` files and the descriptor set that Envoy transcodes with.
Runs in an environment of its own (`make protos`), with the oldest grpcio that clients may have, so that
the committed stubs import everywhere.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import sys
import tempfile
from importlib import resources
from pathlib import Path

from google.api import annotations_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
DESCRIPTORS = ROOT.parent / "deploy" / "envoy" / "interlock.binpb"
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def _run(*arguments: str) -> None:
    # grpc_tools carries google/protobuf, googleapis-common-protos carries google/api.
    well_known = str(resources.files("grpc_tools") / "_proto")
    common = str(Path(annotations_pb2.__file__).parents[2])
    code = protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", f"-I{common}", *arguments])
    if code:
        sys.exit(code)


def generate(out: Path, descriptors: Path) -> None:
    """Writes the stubs of every contract file under `out` and Envoy's descriptor set to `descriptors`."""
    files = [str(path) for path in sorted((ROOT / "interlock").rglob("*.proto"))]
    _run(
        f"--python_out={out}",
        f"--mypy_out={out}",
        f"--grpc_python_out={out}",
        # The servers are asynchronous; one set of types keeps them exact.
        f"--mypy_grpc_out=only_async:{out}",
        *files,
    )
    for path in out.rglob("*_pb2_grpc.py*"):
        # A file without services has no gRPC stub worth importing.
        if "class " not in path.read_text():
            path.unlink()
    _run("--include_imports", f"--descriptor_set_out={descriptors}", *files)


def _generated(root: Path) -> set[Path]:
    return {path.relative_to(root) for pattern in GENERATED for path in (root / "interlock").rglob(pattern)}


def check() -> int:
    """Returns 0 when the committed files are what `generate` makes, else names each that is not."""
    with tempfile.TemporaryDirectory() as name:
        fresh = Path(name)
        descriptors = fresh / "interlock.binpb"
        generate(fresh, descriptors)
        made, committed = _generated(fresh), _generated(ROOT)
        stale = sorted(str(path) for path in made ^ committed)
        stale += [
            str(path)
            for path in sorted(made & committed)
            if not filecmp.cmp(fresh / path, ROOT / path, shallow=False)
        ]
        if not DESCRIPTORS.exists() or not filecmp.cmp(descriptors, DESCRIPTORS, shallow=False):
            stale.append(str(DESCRIPTORS.relative_to(ROOT.parent)))
    for path in stale:
        print(f"stale: {path} (run `make protos` and commit the result)", file=sys.stderr)
    return 1 if stale else 0


def main() -> int:
    """Generates, checks, or writes the image that buf lints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail when a committed file is stale")
    parser.add_argument("--image", type=Path, help="write the descriptors with comments here, for buf")
    arguments = parser.parse_args()
    if arguments.image:
        files = [str(path) for path in sorted((ROOT / "interlock").rglob("*.proto"))]
        _run("--include_imports", "--include_source_info", f"--descriptor_set_out={arguments.image}", *files)
        return 0
    if arguments.check:
        return check()
    with tempfile.TemporaryDirectory() as name:
        fresh = Path(name)
        generate(fresh, DESCRIPTORS)
        for path in _generated(ROOT) - _generated(fresh):
            (ROOT / path).unlink()
        for path in sorted(_generated(fresh)):
            shutil.copy(fresh / path, ROOT / path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
