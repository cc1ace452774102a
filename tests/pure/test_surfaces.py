"""The public surface of each package: `__all__` names exactly what others import."""

from __future__ import annotations

import ast

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


PACKAGES = [name for name in modules() if is_package(name) and house(name)]
TAKEN = {importer: taken(importer) for importer in (*modules(), *users())}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_it_is(package: str) -> None:
    assert ast.get_docstring(tree(package))


@pytest.mark.parametrize("importer", [name for name in modules() if TAKEN[name]])
def test_a_module_takes_only_what_other_packages_offer(importer: str) -> None:
    assert {f"{package}.{name}" for package, name in TAKEN[importer] if name not in public(package)} == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_offers_only_what_others_take(package: str) -> None:
    used = {name for steps in TAKEN.values() for other, name in steps if other == package}
    assert public(package) - used == set()
