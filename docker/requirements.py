"""Prints what the project and some of its extras need, one requirement a line: `python3 requirements.py gateway`.

An image then has its dependencies in a layer of their own, which stays when only the sources change.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for extra in sys.argv[1:]:
    if extra not in project["optional-dependencies"]:
        sys.exit(f"pyproject.toml has no extra {extra!r}; there are {', '.join(project['optional-dependencies'])}")
wanted = [
    *project["dependencies"],
    *(line for extra in sys.argv[1:] for line in project["optional-dependencies"][extra]),
]
print("\n".join(dict.fromkeys(wanted)))
