"""The README's Python runs, top to bottom, as a reader would run it; its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_python_runs(capsys):
    snippets = blocks("python")
    assert len(snippets) >= 3
    namespace = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), namespace)
    assert namespace["params"]["item_embedding"].shape == (5, 8)
    assert "nodes       5" in capsys.readouterr().out


def test_options_exist():
    """Every option that the README gives to ``python -m models`` is one that its help lists."""
    commands = re.findall(r"python -m models (\w+)([^`\n]*)", README)
    assert {command for command, _ in commands} >= {"train", "compare", "graph"}
    for command in {command for command, _ in commands}:
        options = {option for name, rest in commands if name == command for option in re.findall(r"--[\w-]+", rest)}
        shown = subprocess.run(
            [sys.executable, "-m", "models", command, "--help"], capture_output=True, text=True, cwd=ROOT, check=True
        ).stdout
        assert options <= set(re.findall(r"--[\w-]+", shown))


def test_make_targets_and_files_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make (\w+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
    for path in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"python (benchmarks/\w+\.py)", README):
        assert (ROOT / path).exists(), path


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@[A-Z_]+@", README)
