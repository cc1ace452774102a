"""The public surface of each package: `__all__` names exactly what others import."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache

import pytest
from import_graph import imports, is_package, modules, tree, users


def house(module: str) -> str | None:
    """The package whose inside a module belongs to: `services.<name>`, `services.tools.<name>` or `shared.<name>`."""
    parts = module.split(".")
    length = 3 if parts[:2] == ["services", "tools"] else 2
    name = ".".join(parts[:length])
    return name if len(parts) >= length and name in modules() and is_package(name) else None


def public(package: str) -> set[str]:
    """The names in `__all__`: submodules, or names that the package itself defines."""
    for node in tree(package).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


@cache
def taken(importer: str) -> set[tuple[str, str]]:
    """The imports of a module from other houses, one step at a time: (package, the name below it)."""
    steps = set()
    for found in imports(importer):
        home = house(found.module)
        if home is None or home == house(importer):
            continue
        path = [*found.module.split("."), *([found.name] if found.name else [])]
        for length in range(home.count(".") + 1, len(path)):
            package = ".".join(path[:length])
            if package in modules() and is_package(package):
                steps.add((package, path[length]))
    return steps


def owner(module: str) -> str:
    """The module's house; the module itself where it has none."""
    return house(module) or module


PACKAGES = [name for name in modules() if is_package(name) and house(name)]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_a_docstring(package: str) -> None:
    assert ast.get_docstring(tree(package))


@pytest.mark.parametrize("home", sorted({owner(name) for name in modules()}))
def test_modules_import_only_public_names_of_other_packages(home: str) -> None:
    not_offered = {
        (importer, f"{package}.{name}")
        for importer in modules()
        if owner(importer) == home
        for package, name in taken(importer)
        if name not in public(package)
    }
    assert not_offered == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_exports_only_names_that_others_import(package: str) -> None:
    assert public(package) - used()[package] == set()


@cache
def used() -> dict[str, set[str]]:
    """The names that others take from each package."""
    names: dict[str, set[str]] = defaultdict(set)
    for importer in (*modules(), *users()):
        for package, name in taken(importer):
            names[package].add(name)
    return names
