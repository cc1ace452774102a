"""The tree of errors at the head of `shared.errors` is complete."""

from __future__ import annotations

import ast
import re

from import_graph import modules, nodes

from shared import errors


def drawn() -> dict[str, str]:
    """Base class by error, as drawn in the docstring."""
    bases: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    ((?:[│ ] {3})*(?:[├└]── )?)(\w+)(?: |$)", line):
            depth = len(found[1]) // 4
            path[depth:] = [found[2]]
            if depth:
                bases[found[2]] = path[depth - 1]
    return bases


def defined() -> dict[str, str]:
    """Base class by error, for every class below WispError in the product's source."""
    classes = {
        node.name: {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        for module in modules()
        for node in nodes(module)
        if isinstance(node, ast.ClassDef)
    }
    found: dict[str, str] = {}
    size = -1
    while size < len(found):
        size = len(found)
        for name, bases in classes.items():
            if known := bases & {"WispError", *found}:
                (found[name],) = known
    return found


def test_the_tree_of_errors_is_complete() -> None:
    assert drawn() == defined()
