"""What the documents say exists: links, files, flags, targets, fields; what they show as code runs."""

import ast
import dataclasses
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from elaswave.job import Job
from elaswave_launch.flags import build_parser, parse
from elaswave_launch.operator import operate

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = tuple(sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]))
CODE_FOLDERS = ("elaswave", "agent", "controller", "launch", "tests", "scripts", "examples", "benchmarks", "protos")

# Flags of other programs that documents mention.
OTHER_FLAGS = frozenset({"--job", "--worker", "--factor", "--step", "--phase", "--json"})  # the elaswave command
RUN_LIMIT_S = 90.0


def blocks(document: Path) -> Iterator[tuple[str, str]]:
    """Language and text of each fenced block."""
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL):
        yield found[1], found[2]


def commands(program: str) -> list[list[str]]:
    """Arguments of each command line of this program in a fenced block."""
    found: list[list[str]] = []
    for document in DOCUMENTS:
        for language, text in blocks(document):
            lines = text.replace("\\\n", " ").splitlines() if not language else []
            words = [shlex.split(line, comments=True) for line in lines if line.split("#")[0].count("'") % 2 == 0]
            found += [line[1:] for line in words if line and line[0] == program]
    return found


def script_of(document: str) -> str:
    """The first Python block, which is a whole training script."""
    return next(text for language, text in blocks(ROOT / document) if language == "python")


def test_links_lead_somewhere() -> None:
    broken = [
        f"{document.relative_to(ROOT)}: {target}"
        for document in DOCUMENTS
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text())
        if not target.startswith(("http:", "https:")) and not (document.parent / target).exists()
    ]
    assert not broken


def test_readme_leads_to_every_document() -> None:
    text = (ROOT / "README.md").read_text()
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f"](docs/{path.name})" not in text] == []


def test_documents_that_code_cites_exist() -> None:
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for folder in CODE_FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".proto")
        for name in re.findall(r"\bdocs/[\w/.-]+\.md", path.read_text())
        if not (ROOT / name).exists()
    }
    assert not missing


def test_rules_that_code_cites_exist() -> None:
    protocol = (ROOT / "docs" / "protocol.md").read_text()
    known: set[str] = set()
    for number, section in re.findall(r"^## (\d)\.(.*?)(?=^## |\Z)", protocol, re.MULTILINE | re.DOTALL):
        known |= {f"{number}.{rule}" for rule in re.findall(r"^(\d+)\. ", section, re.MULTILINE)}
    cited = {
        rule
        for path in (ROOT / "elaswave").rglob("*.py")
        for text in re.findall(r"\brules? ((?:\d\.\d+(?:, | to | and )?)+)", path.read_text())
        for rule in re.findall(r"\d\.\d+", text)
    }
    assert len(cited) > 10
    assert cited <= known


def test_flags_exist() -> None:
    help_text = build_parser().format_help()
    known = {*re.findall(r"--[a-z][a-z_-]*", help_text), *OTHER_FLAGS}
    for folder in ("examples", "scripts", "benchmarks", "elaswave"):
        for path in (ROOT / folder).rglob("*.py"):
            known |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', path.read_text()))
    unknown = {
        f"{document.relative_to(ROOT)}: {flag}"
        for document in DOCUMENTS
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", document.read_text())
        if flag not in known
    }
    assert not unknown


def test_launch_commands_are_accepted() -> None:
    found = commands("elaswave-launch")
    assert found
    for arguments in found:
        if "SCRIPT" not in arguments:
            assert parse(arguments, {}).script, arguments


def test_operator_commands_are_accepted(tmp_path: Path) -> None:
    found = commands("elaswave")
    assert found
    for arguments in found:
        # 1: there is no such job here; 93 would be wrong arguments.
        assert operate(arguments, {"XDG_RUNTIME_DIR": str(tmp_path)}) == 1, arguments


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = {
        name
        for document in DOCUMENTS
        for name in re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(), re.MULTILINE)
    }
    assert {"demo", "test"} <= named <= targets


def test_files_that_makefile_runs_exist() -> None:
    scripts = re.findall(r"\$\(BIN\)/python (\w+/\w+\.py)", (ROOT / "Makefile").read_text())
    assert scripts
    assert [name for name in scripts if not (ROOT / name).is_file()] == []


def test_paths_of_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    paths = [path for path in re.findall(r"`([a-z_./]+)`", text) if "/" in path]
    assert paths
    assert [path for path in paths if not (ROOT / path).exists() and not (ROOT / "elaswave" / path).exists()] == []


def test_all_fields_of_a_job_are_explained() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    rows = {name for row in re.findall(r"^\| (`[^|]*)\|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert {field.name for field in dataclasses.fields(Job)} <= rows


def test_python_in_documents_compiles() -> None:
    found = [text for document in DOCUMENTS for language, text in blocks(document) if language == "python"]
    assert found
    for text in found:
        ast.parse(text)


@pytest.mark.parametrize("document", ["README.md", "docs/training.md"])
def test_scripts_train(document: str, tmp_path: Path) -> None:
    text = script_of(document)
    assert "steps=100" in text
    script = tmp_path / "train.py"
    script.write_text(text.replace("steps=100", "steps=2"))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=RUN_LIMIT_S, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^step 2/2 ", done.stdout, re.MULTILINE)
    assert re.search(r"^digest [0-9a-f]{64}$", done.stdout, re.MULTILINE)


def test_pictures_are_sound_and_have_words() -> None:
    found = list((ROOT / "docs").rglob("*.svg"))
    assert found
    for path in found:
        root = ElementTree.parse(path).getroot()
        names = {child.tag.partition("}")[2] for child in root}
        assert {"title", "desc"} <= names, path
