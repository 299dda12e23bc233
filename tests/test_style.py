"""House rules that no tool checks: sizes, handlers, imports, words and paths. Generated code is left out."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("elaswave", "agent", "controller", "launch")
FOLDERS = (*PACKAGES, "tests", "scripts", "examples", "benchmarks")
TEXT_FOLDERS = (*FOLDERS, "docs", "protos", "deploy", ".ci")
TEXT_SUFFIXES = (".py", ".md", ".proto", ".toml", ".txt", ".sh", ".yaml", ".yml", "")

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80
MAX_POSITIONAL = 6
MAX_BROAD_SHARE = 0.1

# The core may use these of the standard library: values, arithmetic and typing; nothing that does or reads anything.
CORE_MODULES = frozenset(
    {
        "abc", "array", "bisect", "collections", "copy", "dataclasses", "enum", "fractions", "functools", "hashlib",
        "heapq", "itertools", "math", "numbers", "operator", "re", "statistics", "struct", "types", "typing",
        "numpy", "elaswave",
    }
)  # fmt: skip
PICKLERS = frozenset({"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle"})

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def modules(*folders: str) -> tuple[tuple[Path, ast.Module], ...]:
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if "_pb" not in path.parts)
    return tuple((path.relative_to(ROOT), ast.parse(path.read_text())) for path in paths)


def nodes(*folders: str) -> Iterator[tuple[Path, ast.AST]]:
    for path, tree in modules(*folders):
        for node in ast.walk(tree):
            yield path, node


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module is not None:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def test_the_walk_sees_the_packages() -> None:
    seen = {path.parts[0] for path, _ in modules(*FOLDERS)}
    assert {*PACKAGES, "tests"} <= seen
    assert not any("_pb" in path.parts for path, _ in modules(*FOLDERS))


def test_test_modules_have_names_of_their_own() -> None:
    """pytest imports test files of different folders under their bare names: two of one name cannot be collected."""
    names = [path.name for path, _ in modules("tests") if path.name != "conftest.py"]
    assert sorted(set(names)) == sorted(names)


def test_files_are_short() -> None:
    long = {str(path): lines for path, _ in modules(*FOLDERS) if (lines := line_count(path)) > MAX_FILE_LINES}
    assert not long, f"over {MAX_FILE_LINES} lines: split them"


def line_count(path: Path) -> int:
    return len((ROOT / path).read_text().splitlines())


def test_functions_are_short() -> None:
    long = [
        f"{path}:{node.lineno} {node.name}: {length} lines"
        for path, node in nodes(*FOLDERS)
        if isinstance(node, Function) and (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not long, f"over {MAX_FUNCTION_LINES} lines: split them"


def test_positional_arguments_are_few() -> None:
    many = [
        f"{path}:{node.lineno} {node.name}"
        for path, node in nodes(*PACKAGES)
        if isinstance(node, Function) and positional(node) > MAX_POSITIONAL
    ]
    assert not many, f"over {MAX_POSITIONAL} positional arguments: make them keyword-only"


def positional(function: Function) -> int:
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def test_no_global_statements() -> None:
    found = [f"{path}:{node.lineno}" for path, node in nodes(*FOLDERS) if isinstance(node, ast.Global)]
    assert not found, "pass the object instead"


def test_broad_handlers_are_rare() -> None:
    handlers = [(path, node) for path, node in nodes(*PACKAGES) if isinstance(node, ast.ExceptHandler)]
    broad = [f"{path}:{node.lineno}" for path, node in handlers if is_broad(node)]
    assert len(broad) <= MAX_BROAD_SHARE * len(handlers), f"{len(broad)} of {len(handlers)} handlers: {broad}"


def is_broad(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException") for kind in kinds)


def test_tests_never_sleep() -> None:
    banned = re.compile(r"\btime\.sleep|from time import .*\bsleep\b|asyncio\.sleep\((?!0\))")
    assert not matches(banned, ("tests",)), "wait for the event itself, with a deadline"


def test_core_imports_only_what_is_pure() -> None:
    found = [
        f"{path}:{node.lineno} {name}"
        for path, node in nodes("elaswave/core")
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported(node)
        if name.split(".")[0] not in CORE_MODULES
        or (name.startswith("elaswave") and not name.startswith(("elaswave.core", "elaswave.errors")))
    ]
    assert not found, f"the core may import only {sorted(CORE_MODULES)}"


def test_nothing_is_pickled() -> None:
    found = [
        f"{path}:{node.lineno} {name}"
        for path, node in nodes(*PACKAGES)
        for name in imported(node)
        if name.split(".")[0] in PICKLERS
    ]
    assert not found, "typed messages or plain bytes instead"


def test_any_stays_in_wire_modules() -> None:
    found = [
        f"{path}:{node.lineno}"
        for path, node in nodes(*PACKAGES)
        if "typing.Any" in imported(node) and not {"wire", "wire.py"} & set(path.parts)
    ]
    assert not found, "name the type"


def test_no_traces_of_a_machine_or_of_unfinished_work() -> None:
    words = ("TODO", "FIXME", "XXX")
    folders = ("work", "root", "home")  # of a machine that something was written on
    parts = [*(rf"\b{word}s?\b" for word in words), *(rf"(?<![\w.])/{folder}/\w" for folder in folders)]
    pattern = re.compile("|".join(parts))
    assert not matches(pattern, TEXT_FOLDERS)


def matches(pattern: re.Pattern[str], folders: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts(folders)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]


def texts(folders: tuple[str, ...]) -> Iterator[Path]:
    tops = (path for path in ROOT.iterdir() if path.is_file() and path.suffix in (".md", ".toml", ".txt"))
    yield from sorted([*tops, ROOT / "Makefile"])
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            hidden = {"__pycache__", "_pb"} & set(path.parts)
            if path.is_file() and path.suffix in TEXT_SUFFIXES and not hidden and path != Path(__file__):
                yield path
