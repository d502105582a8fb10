"""The oldest versions that pyproject.toml allows, as pip wants them: ``python tests/lowest.py EXTRA …``.

Printed are the library's own requirements and those of the named extras. What these need in turn, pip chooses.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def lowest(*extras: str) -> Iterator[str]:
    """``name==version`` of every requirement that has a floor."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    requirements = project["dependencies"] + [r for extra in extras for r in project["optional-dependencies"][extra]]
    for requirement in requirements:
        found = re.fullmatch(r"([\w.-]+)\s*>=\s*([\w.]+)", requirement)
        if not found:
            raise SystemExit(f"{requirement!r} in pyproject.toml has no floor; write it as name>=version")
        yield f"{found[1]}=={found[2]}"


if __name__ == "__main__":
    print(*lowest(*sys.argv[1:]), sep="\n")
