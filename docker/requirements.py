"""Prints the requirements of the project and some extras, one per line: `python3 requirements.py gateway`.

Images install them in a layer of its own, which survives changes of the sources.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for extra in sys.argv[1:]:
    if extra not in project["optional-dependencies"]:
        sys.exit(f"pyproject.toml has no extra {extra!r}; the extras are {', '.join(project['optional-dependencies'])}")
wanted = [
    *project["dependencies"],
    *(line for extra in sys.argv[1:] for line in project["optional-dependencies"][extra]),
]
print("\n".join(dict.fromkeys(wanted)))
