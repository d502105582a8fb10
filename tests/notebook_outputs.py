"""Whether notebooks hold the outputs of one clean run from top to bottom, as the documentation shows them.

``python tests/notebook_outputs.py FILE …`` lists what is wrong and ends with 1 if anything is.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path


def problems(path: Path) -> Iterator[str]:
    """One line for each thing that is wrong with a notebook."""
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    cells = [cell for cell in cells if "".join(cell["source"]).strip()]
    if [cell["execution_count"] for cell in cells] != list(range(1, len(cells) + 1)):
        yield f"{path}: its cells were not run once each, from top to bottom; restart it, run all cells, and save"
    if not any(cell["outputs"] for cell in cells):
        yield f"{path}: it has no outputs; the documentation shows those that it is saved with"
    for number, cell in enumerate(cells, 1):
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                yield f"{path}: cell {number} ends with {output['ename']}: {output['evalue']}"
            if output.get("name") == "stderr":
                yield f"{path}: cell {number} prints to stderr: {''.join(output['text'])[:80]!r}"


def main(paths: list[str]) -> int:
    """Prints what is wrong; returns 1 if anything is."""
    found = [problem for path in paths for problem in problems(Path(path))]
    print(*found, sep="\n", end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
