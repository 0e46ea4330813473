"""The English text that ships inside CPython: the language reference behind `help()`, and the docstrings.

It is there with no network. Files are parsed, never imported, so nothing runs.
"""

import ast
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SHORTEST = 40  # characters; shorter docstrings say nothing
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "_bundled"}


def documents(library: Path | None = None) -> dict[str, str]:
    """Topics and then the docstrings of each module, under their names, in a fixed order."""
    library = Path(sysconfig.get_paths()["stdlib"]) if library is None else library
    found = {f"topic {name}": text for name, text in sorted(topics(library / "pydoc_data" / "topics.py").items())}
    for file in sorted(library.rglob("*.py"), key=lambda file: file.relative_to(library).parts):
        parts = file.relative_to(library).with_suffix("").parts
        if SKIPPED.isdisjoint(parts):
            name = ".".join(parts).removesuffix(".__init__")
            text = "\n\n".join(docstrings(file, name))
            if text:
                found[name] = text + "\n"
    return found


def topics(file: Path) -> dict[str, str]:
    """The dictionary of topics in a `pydoc_data/topics.py`; empty where there is none."""
    for statement in _parse(file).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "topics":
            return ast.literal_eval(statement.value)
    return {}


def docstrings(file: Path, module: str) -> Iterator[str]:
    """Each docstring of a source file, under the full name of what it describes, in order of the source."""
    todo: list[tuple[str, ast.AST]] = [(module, _parse(file))]
    while todo:
        name, node = todo.pop(0)
        text = ast.get_docstring(node, clean=False) if isinstance(node, DESCRIBED) else None
        if text and len(text := inspect.cleandoc(text)) >= SHORTEST:
            yield f"{name}\n\n{text}"
        todo[:0] = [(f"{name}.{child.name}", child) for child in getattr(node, "body", []) if hasattr(child, "name")]


DESCRIBED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _parse(file: Path) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in other people's strings
            return ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])
