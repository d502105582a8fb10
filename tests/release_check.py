"""Whether the wheel alone, in a clean environment, does what the README's first snippet says.

Run by ``make release-check`` with the interpreter of that environment, outside of the clone.
"""

import importlib.metadata
import importlib.util
import re
import sys
import sysconfig
from pathlib import Path


def main(readme: Path) -> None:
    import sevo_optax

    where = Path(sevo_optax.__file__)
    if not where.is_relative_to(sysconfig.get_paths()["purelib"]):
        raise SystemExit(f"sevo_optax comes from {where}, not from the wheel")
    if not (where.parent / "py.typed").exists():
        raise SystemExit("the wheel has no py.typed: type checkers will not see its annotations")
    metadata = importlib.metadata.metadata("sevo-optax")
    version = metadata["Version"]
    if sevo_optax.__version__ != version:
        raise SystemExit(f"sevo_optax.__version__ is {sevo_optax.__version__}, but the wheel has version {version}")
    for name in ("models", "tests", "flax"):
        if importlib.util.find_spec(name):
            raise SystemExit(f"{name} can be imported: this environment holds more than the wheel and what it needs")
    if relative := re.findall(r"\]\((?!https?:)[^)]*\)", metadata.get_payload()):
        raise SystemExit(f"the wheel's description has links that work in a clone alone: {relative}")
    snippet = re.search(r"^```python\n(.*?)^```", readme.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    namespace = {}
    exec(compile(snippet.group(1), str(readme), "exec"), namespace)
    params = namespace["params"]
    if params["item_embedding"].shape != (5, 8):
        raise SystemExit(f"the README's first snippet ended with {params}")
    print(f"sevo-optax {version}: the wheel alone imports and runs the README's first snippet")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
