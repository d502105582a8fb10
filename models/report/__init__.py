"""One page about training runs that opens in a browser, without a server and without network."""

import dataclasses
from pathlib import Path

from models.checks import check_titles
from models.files import make_folder

# JAX, scipy and plotly are imported by run(), so that --help answers at once.


@dataclasses.dataclass(frozen=True)
class Report:
    """Write one HTML page about runs: curves, metrics, graphs, the items and their neighbours. No network is needed."""

    runs: tuple[Path, ...]
    """Folders: of a run, of a comparison, of several of these, or of results, one cell a file."""
    output: Path = Path("report.html")
    """The page to write."""
    data: Path | None = None
    """Where the runs' data lies now; graphs and popularity are taken from it (left out: where it was)."""
    titles: Path | None = None
    """A table with one line an item (.csv, .tsv, .parquet, .json, also compressed), to show titles from."""
    title_item_column: str = "item_id"
    """Its column of item ids."""
    title_column: str = "title"
    """Its column of titles."""
    quiet: bool = False
    """Say nothing but where the page is."""

    def run(self) -> None:
        """Reads the runs, and prints where the page is."""
        if not self.runs:
            raise ValueError("runs must name one or more folders, got none")
        if self.output.suffix not in (".html", ".htm"):
            raise ValueError(f"output must end in .html, got {self.output}")
        make_folder("output", self.output.parent)
        if self.output.is_dir():
            raise ValueError(f"output: {self.output} is a folder; give a file")
        check_titles(self)
        titles = None
        if self.titles is not None:
            from models.data import read_titles

            titles = read_titles(self.titles, item_column=self.title_item_column, title_column=self.title_column)

        from models.report.page import write_page
        from models.report.runs import read_groups

        groups = read_groups(self.runs)
        found = sum(len(arm.runs) for group in groups for arm in group.arms)
        self._say(f"{found} {'run' if found == 1 else 'runs'} of {len(groups)} {_subjects(len(groups))}")
        write_page(groups, self.output, titles=titles, data=self.data, with_umap=True, say=self._say)
        print(f"report: {self.output} ({self.output.stat().st_size / 1e6:.1f} MB)")

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)


def _subjects(count: int) -> str:
    return "model on its data" if count == 1 else "models on their data"
