"""Names: a class name means one thing in the whole tree, and the names of tests are short enough to read."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from pathlib import Path

from import_graph import modules, nodes, users

LONGEST_TEST_NAME = 70
QUESTIONS = {"How", "What", "When", "Where", "Whether", "Which", "Who", "Why"}


def test_no_class_name_is_defined_twice() -> None:
    places = defaultdict(list)
    for module in modules():
        for node in nodes(module):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{module}:{node.lineno}")
    assert {"Verify", "StopRule", "_Spinner"} <= set(places), "the search covers services and shared, private names too"
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_parameters_that_are_ids_say_so() -> None:
    """A session is an object, and its id a string."""
    words = {"session", "verifier", "drafter", "gateway", "scheduler"}
    found, ids = set(), set()
    for module in modules():
        for node in nodes(module):
            if isinstance(node, ast.arg) and node.annotation is not None and ast.unparse(node.annotation) == "str":
                if node.arg in words:
                    found.add(f"{module}:{node.lineno} {node.arg}")
                elif node.arg.removesuffix("_id") in words:
                    ids.add(module)
    assert {"shared.state.store", "shared.engine.engine", "services.gateway.sessions"} & ids
    assert found == set()


def test_names_of_tests_are_short() -> None:
    names = {
        name: user
        for user, path in users().items()
        for name in re.findall(r"^ *(?:async )?def (test_\w+)", path.read_text("utf-8"), re.MULTILINE)
    }
    assert "test_names_of_tests_are_short" in names
    assert {name: place for name, place in names.items() if len(name) > LONGEST_TEST_NAME} == {}


def test_no_docstring_begins_with_a_question() -> None:
    """It says what the thing does or is: "Return whether …", not "Whether …"."""
    begins = {}
    for module in modules():
        for node in nodes(module):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                begins[f"{module}: {getattr(node, 'name', '')}"] = (ast.get_docstring(node) or "").split(" ")[0]
    assert begins["shared.slo: batch_period_ms"] == "Return"
    assert [place for place, word in begins.items() if word in QUESTIONS] == []


def test_no_two_test_files_have_the_same_name() -> None:
    """pytest imports test files by name alone, and would refuse the second."""
    folder = Path(__file__).parents[1]
    names = Counter(path.name for path in folder.rglob("*.py") if path.name not in ("__init__.py", "conftest.py"))
    assert names["test_names.py"] == 1
    assert [name for name, count in names.items() if count > 1] == []
