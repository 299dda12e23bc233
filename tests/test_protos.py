"""The generated modules that are committed are those of protos/, and they load without grpc."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ROOT / "elaswave" / "_pb"


def test_generated_code_is_current(tmp_path: Path) -> None:
    assert version("grpcio-tools") == "1.71.2", "run `make install`: other versions generate other text"
    script = ROOT / "scripts" / "generate_protos.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=60, capture_output=True)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in GENERATED.glob("*_pb2*.py*")}
    assert made == committed, "run `.venv/bin/python scripts/generate_protos.py` and commit the result"


def test_messages_are_registered_under_their_package() -> None:
    code = "from elaswave._pb import control_pb2 as m; print(m.DESCRIPTOR.package, m.PlanDelta.__module__)"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.split() == ["elaswave.v1", "elaswave._pb.control_pb2"]


@pytest.mark.parametrize("module", ["elaswave._pb.control_pb2", "elaswave.wire", "elaswave.core.plan", "elaswave"])
def test_light_modules_import_neither_grpc_nor_torch(module: str) -> None:
    code = f"import sys, {module}; print([name for name in ('grpc', 'torch', 'asyncio') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_services_load() -> None:
    code = "from elaswave._pb import control_pb2_grpc as g; g.AgentServiceStub, g.OperatorServiceServicer"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60, capture_output=True)
