"""The house keeps its rules: imports point one way, files stay short, the README's tree is true."""

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "loratools"
FILES = sorted(PACKAGE.rglob("*.py"))
LINES = 420

# What each room may import; nobody imports upwards, and a new room gets a row here.
MATHS = {"errors", "adapter", "views", "narrowing", "kinds", "algebra", "rewriting", "truncating"}
LOOP = {"stored", "exact", "kernels", "desk", "folding", "sampling", "untouched", "streaming"}
FILING = {"_version", "errors", "adapter", "containers", "weights", "names", "receipt"}
BINDING = {
    "errors", "adapter", "kinds", "names", "weights", "plan", "vocabulary", "experts", "fitting",
    "sizing",
}  # fmt: skip
MAKING = MATHS | FILING | BINDING | {"translating", "merging", "bind"}
MAKING |= LOOP
ROOMS: dict[str, set[str]] = {
    "_version": set(),
    "codes": set(),
    "errors": {"codes"},
    "adapter": {"errors"},
    "exact": {"errors", "adapter", "algebra"},
    "narrowing": {"errors", "adapter", "exact"},
    "kernels": {"exact"},
    "desk": {"errors", "adapter", "plan"},
    "kinds": {"errors", "adapter", "views"},
    "algebra": {"errors", "adapter", "kinds", "rewriting"},
    "rewriting": {"errors", "adapter", "kinds", "views"},
    "truncating": {"errors", "adapter", "kinds", "algebra"},
    "merging": MATHS,
    "containers": {"errors", "adapter"},
    "views": {"adapter"},
    "runtime": {"errors", "adapter", "views"},
    "names": {"errors", "adapter"},
    "formats": {"errors", "adapter", "kinds", "views", "runtime", "containers", "names"},
    "weights": {"errors", "adapter", "containers"},
    "translating": {"errors", "adapter", "rewriting", "names"},
    "experts": {"errors", "adapter", "kinds", "names"},
    "fitting": {"errors", "adapter", "translating", "names", "experts"},
    "plan": {"errors", "adapter", "names", "weights"},
    "vocabulary": {"errors", "adapter", "plan", "weights"},
    "findings": {"errors", "adapter", "names", "weights"},
    "sizing": {"adapter", "kinds", "views"},
    "bind": BINDING | {"views", "findings"},
    "receipt": {"_version", "errors", "adapter", "containers", "weights"},
    "recipe": {"errors", "adapter", "containers", "receipt"},
    "stored": {"errors", "adapter", "algebra"},
    "folding": MATHS | {"stored", "exact", "kernels", "desk", "plan", "containers", "weights"},
    "sampling": {"adapter", "algebra", "stored", "containers", "desk", "plan", "folding"},
    "untouched": {"errors", "adapter", "narrowing", "stored", "containers", "weights"},
    "streaming": (MATHS | LOOP) - {"sampling", "streaming"} | {"plan", "containers", "weights"},
    "exporting": MATHS | FILING | LOOP | {"bind", "plan"},
    "proving": MAKING | {"exporting"},
    "comparing": MAKING,
    "report": {"errors", "adapter", "comparing"},
    "hub": {"_version", "errors", "adapter", "containers", "weights", "receipt"},
    "cluster": {"errors", "adapter", "plan", "containers", "folding", "streaming", "weights"},
    "commands": MAKING
    | {"formats", "runtime", "recipe", "exporting", "proving", "comparing", "report", "hub"}
    | {"cluster"},
    "cli": {"_version", "errors", "commands"},
    "memory": MAKING | {"formats", "commands"},
    "__main__": {"cli"},
    "__init__": set(),  # takes its public names from anywhere, lazily
}

# Who may import what from outside: nobody else, not even inside a function.
ONLY_IN = {
    "huggingface_hub": {"hub"},
    "httpx2": {"hub"},
    "model_signing": {"hub"},
    "typer": {"cli"},
    "rich": {"cli"},
    "ray": {"cluster"},
}
# Rooms and files that do maths and may import torch at once; the others import them when needed.
MATHEMATICAL = set(
    "algebra exact narrowing truncating merging stored desk kernels folding sampling untouched "
    "streaming proving exporting commands/numbers.py commands/folded.py commands/graph_fold.py "
    "commands/replayed.py commands/again.py weights/requantising.py weights/spool.py".split()
)
NO_TORCH = {
    "errors",
    "names",
    "rewriting",
    "translating",
    "fitting",
    "plan",
    "vocabulary",
    "bind",
    "cli",
}  # not even inside a function
UNFINISHED = r"TODO|FIXME|XXX|NotImplementedError|not (yet )?(implemented|supported yet)"

each_file = pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_mathematical(file: Path) -> bool:
    return bool({room(file), file.relative_to(PACKAGE).as_posix()} & MATHEMATICAL)


def imported(nodes: Iterator[ast.AST], file: Path) -> Iterator[str]:
    """The dotted names that import statements among the nodes ask for."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when a module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from at_import(child)


@each_file
def test_imports_point_one_way(file):
    here = room(file)
    assert here in ROOMS, f"loratools/{here} is a new room: give it a row in ROOMS"
    for name in imported(ast.walk(tree(file)), file):
        top, _, rest = name.partition(".")
        if top == "loratools" and here != "__init__":
            target = rest.split(".")[0]
            assert target == here or target in ROOMS[here], f"{here} may not import {target}"
        assert here in ONLY_IN.get(top, {here}), f"{top} is imported in {ONLY_IN[top]} only"
        assert not (here in NO_TORCH and top in ("torch", "numpy")), f"{here} needs no {top}"


def test_the_rooms_have_an_order():
    """Every room can be put after all rooms that it imports."""
    placed: set[str] = set()
    while left := ROOMS.keys() - placed:
        free = {here for here in left if placed >= ROOMS[here]}
        assert free, f"these import each other: {sorted(left)}"
        placed |= free


@each_file
def test_torch_and_numpy_are_imported_early_only_where_the_maths_is(file):
    if not is_mathematical(file):
        early = {name.split(".")[0] for name in imported(at_import(tree(file)), file)}
        assert not early & {"torch", "numpy"}


def is_format(file: Path) -> bool:
    made = {node.name for node in tree(file).body if isinstance(node, ast.FunctionDef)}
    return file.parent.name == "formats" and {"detect", "read"} <= made


FORMATS = {f"loratools.formats.{file.stem}" for file in FILES if is_format(file)}


@each_file
def test_a_format_knows_no_other_format(file):
    if is_format(file) and file.name != "__init__.py":
        for name in imported(ast.walk(tree(file)), file):
            assert not any(f"{name}.".startswith(f"{other}.") for other in FORMATS), name


@each_file
def test_every_file_opens_with_a_sentence_and_is_short(file):
    sentence = (ast.get_docstring(tree(file)) or "").split("\n\n")[0]
    assert sentence.endswith("."), "what lives here?"
    assert len(file.read_text().splitlines()) <= LINES, "is there a second thing living here?"


@each_file
def test_no_file_has_words_of_unfinished_work(file):
    assert re.findall(UNFINISHED, file.read_text()) == []


@each_file
def test_nothing_hides_an_error_trusts_an_input_or_prints(file):
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called != "print" or room(file) == "cli", f"line {node.lineno} prints"
            assert called not in ("yaml.load", "eval", "exec", "pickle.load", "pickle.loads")
            for option in node.keywords:
                given = option.arg, ast.unparse(option.value)
                assert given not in (
                    ("strict", "False"),
                    ("weights_only", "False"),
                    ("trust_remote_code", "True"),
                ), f"line {node.lineno}: {given}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: except everything"


def test_no_public_name_is_the_name_of_a_module():
    if (PACKAGE / "__init__.py").exists():
        public = set(importlib.import_module("loratools").__all__)
        assert public & {room(file) for file in FILES} == set()


def drawn(text: str) -> set[str]:
    """The paths of a drawn tree: one entry a line, indented or with branches, then what it is."""
    paths: set[str] = set()
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        entry = re.match(r"([\s│├└─|`+-]*)(\S+)", line)
        if entry is None:
            continue
        depth, name = len(entry[1]), entry[2]
        while above and above[-1][0] >= depth:
            above.pop()
        path = (above[-1][1] if above else "") + name
        if name.endswith("/"):
            above.append((depth, path))
        paths.add(path)
    return paths


@pytest.mark.parametrize(
    "branches",
    [("  ", "  ", "    ", "  "), ("├── ", "├── ", "│   └── ", "└── ")],
)
def test_a_tree_is_read_as_it_is_drawn(branches):
    names = ["errors.py", "names/", "a.py", "cli.py"]
    lines = [b + name + "   what it is" for b, name in zip(branches, names, strict=True)]
    assert drawn("\n".join(["loratools/", *lines, "", "README.md  this"])) == {
        "loratools/",
        "loratools/errors.py",
        "loratools/names/",
        "loratools/names/a.py",
        "loratools/cli.py",
        "README.md",
    }


def test_the_tree_in_the_readme_is_true():
    readme = ROOT / "README.md"
    text = readme.read_text() if readme.exists() else ""
    block = re.search(r"<!-- tree -->\s*```\w*\n(.*?)```\s*<!-- /tree -->", text, re.DOTALL)
    assert block or not readme.exists(), "README.md has no <!-- tree --> block"
    paths = drawn(block[1]) if block else set()
    for path in paths:
        assert (ROOT / path).exists(), f"README.md draws {path}, which is not there"
    if block:
        rooms = {f"{file.parent.relative_to(ROOT)}/" for file in FILES}
        # A room's line speaks for its __init__.py.
        files = {str(f.relative_to(ROOT)) for f in FILES if f.name != "__init__.py"}
        assert (rooms | files) - paths == set(), "README.md does not draw these"
