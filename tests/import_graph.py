"""The product's modules and what each imports, read from their source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOPS = ("services", "shared")
USERS = ("tests", "docker")
"""Folders of code that uses the product without being part of it."""
_MARKS = frozenset(
    {
        kind
        for base in (ast.expr_context, ast.operator, ast.unaryop, ast.cmpop, ast.boolop)
        for kind in base.__subclasses__()
    }
)


@dataclass(frozen=True)
class Import:
    """One imported name: `from module import name`, or `import module` with an empty name."""

    module: str
    name: str = ""

    @property
    def target(self) -> str:
        """The module that the statement loads: `module.name` where that is a module of the product."""
        inner = f"{self.module}.{self.name}"
        return inner if self.name and inner in modules() else self.module


@cache
def modules() -> dict[str, Path]:
    """Every module and package of the product: dotted name to file."""
    found = {}
    for top in TOPS:
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def users() -> dict[str, Path]:
    """Every file that uses the product without being part of it."""
    return {str(path.relative_to(ROOT)): path for top in USERS for path in sorted((ROOT / top).rglob("*.py"))}


@cache
def tree(module: str) -> ast.Module:
    """The parsed source of a module."""
    path = modules().get(module) or users()[module]
    return ast.parse(path.read_text())


@cache
def nodes(module: str) -> tuple[ast.AST, ...]:
    """Every node of a module's source, without those that only mark how another one is used."""
    return tuple(_walk(tree(module), with_type_checking=True))


def is_package(module: str) -> bool:
    """Return whether the module is a package."""
    return modules()[module].name == "__init__.py"


@cache
def imports(module: str) -> tuple[Import, ...]:
    """Everything that the module imports when it runs, inside functions too, but not for type checking alone."""
    found: list[Import] = []
    attributes: list[tuple[str, str]] = []
    for node in _walk(tree(module), with_type_checking=False):
        match node:
            case ast.Import(names=names):
                found.extend(Import(alias.name) for alias in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                assert level == 0, "imports are absolute"
                found.extend(Import(source or "", alias.name) for alias in names)
            case ast.Constant(value=str(name)) if name in modules():
                found.append(Import(name))  # loaded by name, or run as `python -m`
            case ast.Attribute(value=ast.Name(id=name), attr=attribute):
                attributes.append((name, attribute))
    packages = {other.name: other.target for other in found if other.target != other.module}
    # `from shared import cost`, and then `cost.predict_ms`.
    found.extend(Import(packages[name], attribute) for name, attribute in attributes if name in packages)
    return tuple(found)


def _walk(root: ast.AST, *, with_type_checking: bool) -> Iterator[ast.AST]:
    """Yield nodes as `ast.walk` does, but no contexts and operators, which are half of all."""
    pending = [root]
    while pending:
        node = pending.pop()
        yield node
        if not with_type_checking and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        for value in vars(node).values():
            if isinstance(value, list):
                pending.extend(one for one in value if isinstance(one, ast.AST) and type(one) not in _MARKS)
            elif isinstance(value, ast.AST) and type(value) not in _MARKS:
                pending.append(value)


def loaded_by(module: str) -> set[str]:
    """The modules of the product that importing `module` loads, itself and the packages around each included."""
    seen: set[str] = set()
    pending = [module]
    while pending:
        current = pending.pop()
        parts = current.split(".")
        for name in (".".join(parts[:length]) for length in range(1, len(parts) + 1)):
            if name in modules() and name not in seen:
                seen.add(name)
                pending.extend(found.target for found in imports(name))
    return seen
