"""Generates elaswave/_pb/ from protos/: python scripts/generate_protos.py [OUTPUT_FOLDER].

The generated modules are committed, so that an installation needs no compiler; tests/test_protos.py finds out when
they are not current. Needs grpcio-tools of exactly the version in constraints.txt.
"""

import argparse
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "protos"
GENERATED = ROOT / "elaswave" / "_pb"


def generate(output: Path) -> tuple[Path, ...]:
    """Write the modules of every .proto below protos/ into `output`, flat. Returns the paths written.

    Raises SystemExit where the compiler refuses a file; it has said why on stderr.
    """
    output.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{SOURCE}", f"-I{resources.files('grpc_tools') / '_proto'}"]
    names = [str(path.relative_to(SOURCE)) for path in sorted(SOURCE.rglob("*.proto"))]
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
        status = protoc.main(["protoc", *includes, *flags, *names])
        if status:
            raise SystemExit(status)
        return tuple(_place(made, output) for made in sorted(Path(folder).rglob("*_pb2*.py*")))


def _place(made: Path, output: Path) -> Path:
    # protoc names modules after the path of the .proto; they live in elaswave._pb whatever that path is.
    package = ".".join(made.parent.parts[-2:])
    target = output / made.name
    text = made.read_text().replace(f"from {package} import", "from elaswave._pb import")
    target.write_text(text.replace(f"'{package}.{made.stem}'", f"'elaswave._pb.{made.stem}'"))
    return target


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", type=Path, default=GENERATED)
    for path in generate(parser.parse_args().output):
        print(path)


if __name__ == "__main__":
    main()
