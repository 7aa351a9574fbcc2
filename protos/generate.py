"""Write the gRPC stubs beside their sources, or check that the committed ones are up to date.

    python protos/generate.py           writes
    python protos/generate.py --check   exits 1 and names the files that differ

Runs in an environment made from ``protos/requirements.txt``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
SOURCES = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob("weft/v1/*.proto"))


def generate(to: Path) -> list[Path]:
    """Compile all sources below ``to``; returns the files written, without stubs of services that do not exist."""
    well_known = Path(protoc.__file__).parent / "_proto"
    outputs = [f"--{kind}_out={to}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    if protoc.main(["protoc", f"-I{PROTOS}", f"-I{well_known}", *outputs, *SOURCES]):
        raise SystemExit("protoc failed")
    written = []
    for path in sorted(to.glob("weft/v1/*_pb2*")):
        if "_pb2_grpc" in path.name and "_service_pb2_grpc" not in path.name:
            path.unlink()
        else:
            written.append(path)
    return written


def main() -> int:
    """Write or check; returns the exit status."""
    if "--check" not in sys.argv[1:]:
        generate(PROTOS)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        fresh = generate(Path(scratch))
        stale = [
            path.name
            for path in fresh
            if not (PROTOS / "weft/v1" / path.name).exists()
            or (PROTOS / "weft/v1" / path.name).read_bytes() != path.read_bytes()
        ]
    if stale:
        print(f"out of date: {', '.join(stale)}; run make protos")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
