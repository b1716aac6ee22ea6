"""No file over 350 lines, no function over 60: what is longer holds two things, or is about to. A docstring does not count."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE, FUNCTION = 350, 60
PLACES = ("src", "tests", "recipes", "benchmarks", "examples", ".ci", "docs")
BRACED = (".h", ".cpp", ".js", ".html")
CODE = (".py", ".sh", ".css", *BRACED)
GENERATED = "docs/reference/"
BEGINNING = re.compile(r"^([ \t]*)(async def|def|class)\b", re.MULTILINE)
WORDS = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.DOTALL)
"""Comments and texts, in which braces are none."""
NOT_FUNCTIONS = re.compile(
    r"\s*(?:[\w:]+:\s*)?(?:(?:}\s*)?else\b|if|for|while|switch|do|try|catch|class|struct|union|enum|namespace)\b"
)
"""How what stands before a brace begins, if it is no function's."""
HEAD = re.compile(r"\)[^()]*$|\)\s*:\s*\w.*$|=>\s*$|\]\s*$", re.DOTALL)
"""How what stands before a function's brace ends: its arguments, what is said behind them or set before its body, or its arrow."""


def files() -> Iterator[tuple[str, str]]:
    """Every file of code and what is in it."""
    for place in PLACES:
        for path in sorted((ROOT / place).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix in CODE and not name.startswith(GENERATED):
                yield name, path.read_text(encoding="utf-8")


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Names and lines of code of the functions in a module, those within classes and functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            said = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
            lines = (node.end_lineno or 0) - node.lineno + 1
            yield node.name, lines - ((said.end_lineno or 0) - said.lineno + 1 if said else 0)


def may_be_long(source: str) -> bool:
    """Whether a function may have too many lines: its end is no further than the next beginning that is not within it."""
    found = [(m.start(), len(m[1]), m[2]) for m in BEGINNING.finditer(source)]
    for i, (start, indent, kind) in enumerate(found):
        end = next((at for at, other, _ in found[i + 1 :] if other <= indent), len(source))
        if kind != "class" and source.count("\n", start, end) > FUNCTION:
            return True
    return False


def braced(source: str) -> Iterator[tuple[str, int]]:
    """Heads and lines of the functions of C++ or JavaScript, from the head's first line to the closing brace, those within others
    too."""
    source = WORDS.sub(lambda found: "\n" * found[0].count("\n"), source)
    source = re.sub(
        r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", lambda found: "\n" * found[0].count("\n"), source, flags=re.MULTILINE
    )
    opened: list[tuple[int, str]] = []
    begins = 0  # of the statement
    for at in (found.start() for found in re.finditer(r"[{};]", source)):
        if source[at] == "{":
            head = source[begins:at]
            is_function = HEAD.search(head) is not None and NOT_FUNCTIONS.match(head) is None
            opened.append((begins + len(head) - len(head.lstrip()), head.strip() if is_function else ""))
        elif source[at] == "}" and opened:
            start, head = opened.pop()
            if head:
                yield head, source.count("\n", start, at) + 1
        elif source.count("(", begins, at) > source.count(")", begins, at):
            continue  # within the head of a loop
        begins = at + 1


def test_files_are_short() -> None:
    assert {name: n for name, text in files() if (n := len(text.splitlines())) > FILE} == {}


def test_functions_are_short() -> None:
    long = [
        (name, function, n)
        for name, text in files()
        if name.endswith(".py") and may_be_long(text)  # reading all syntax trees takes ten times as long
        for function, n in functions(text)
        if n > FUNCTION
    ]
    long += [
        (name, head, n) for name, text in files() if name.endswith(BRACED) for head, n in braced(text) if n > FUNCTION
    ]
    assert long == []


@pytest.mark.parametrize(
    ("lines", "said", "counted"), [(3, "", 4), (59, "", 60), (60, "", 61), (60, '"""a\n\n    b"""', 61)]
)
def test_the_control_lines_are_counted(lines: int, said: str, counted: int) -> None:
    source = "class A:\n  def f(self):\n" + (f"    {said}\n" if said else "") + "    x = 1\n" * lines
    assert list(functions(source)) == [("f", counted)]
    assert may_be_long(source) or counted <= FUNCTION


BRACES = """#define WITH(x) \\
    if (x) {
// a comment {
namespace n {
struct A {
    explicit A(int a) : a_(a), b_(1) {
        for (int i = 0; i < a; ++i) { if (i) continue; }
    }
    template <class W>
    int f(int a,
          int b) const override {
        const auto say = [&](int x) {
            return "{" + x;
        };
        if (a) {
            b = 1;
        } else if (b) {
            b = 2;
        } else {
            b = 3;
        }
        return switch_(a);
    }
    int a_{0};
};
}
const draw = (x) => {
    return x;
};
async function ask(url) {
    await fetch(url);
}
"""


def test_braces_are_counted() -> None:
    lines = [(head.split("(")[0].split()[-1], n) for head, n in braced(BRACES)]
    assert lines == [("A", 3), ("[&]", 3), ("f", 15), ("=", 3), ("ask", 3)]
