"""Names: a class name means one thing in the whole tree, and the names of tests are short enough to read."""

from __future__ import annotations

import ast
from collections import defaultdict

from import_graph import modules, tree, users

LONGEST_TEST_NAME = 90


def test_no_class_name_is_defined_twice() -> None:
    places = defaultdict(list)
    for module in modules():
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{module}:{node.lineno}")
    assert {"Verify", "StopRule", "_Spinner"} <= set(places), "the search covers services and shared, private names too"
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_names_of_tests_are_short() -> None:
    names = {
        node.name: f"{user}:{node.lineno}"
        for user in users()
        for node in ast.walk(tree(user))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }
    assert "test_names_of_tests_are_short" in names
    assert {name: place for name, place in names.items() if len(name) > LONGEST_TEST_NAME} == {}
