"""Public data sets by name."""

import dataclasses
import os
from pathlib import Path

from models.data.download import cache_folder, check_md5, download, extract

_GROUPLENS = "https://files.grouplens.org/datasets/movielens"
_AMAZON = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"


@dataclasses.dataclass(frozen=True)
class NamedSet:
    """A public data set.

    Attributes:
      url: where its publisher offers it.
      num_interactions: how many interactions the publisher counts.
      md5: the publisher's digest of the file; None: the publisher gives none.
      member: the interactions inside the archive, ``folder/file``; None: the file is no archive.
    """

    url: str
    num_interactions: int
    md5: str | None = None
    member: str | None = None

    @property
    def file_name(self) -> str:
        """What the download is called."""
        return self.url.rsplit("/", 1)[-1]


NAMED: dict[str, NamedSet] = {
    "ml-100k": NamedSet(f"{_GROUPLENS}/ml-100k.zip", 100_000, "0e33842e24a9c977be4e0107933c0723", "ml-100k/u.data"),
    "ml-1m": NamedSet(f"{_GROUPLENS}/ml-1m.zip", 1_000_209, "c4d9eecfca2ab87c1945afe126590906", "ml-1m/ratings.dat"),
    "amazon-beauty": NamedSet(f"{_AMAZON}/reviews_Beauty_5.json.gz", 198_502),
    "amazon-toys": NamedSet(f"{_AMAZON}/reviews_Toys_and_Games_5.json.gz", 167_597),
    "amazon-tools": NamedSet(f"{_AMAZON}/reviews_Tools_and_Home_Improvement_5.json.gz", 134_476),
}
"""The data sets that ``--data`` knows by name: MovieLens, and the 5-core reviews of Amazon up to 2014."""


def fetch_named(name: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where the interactions of a public data set are on this machine, fetched if they were not there yet.

    Args:
      name: one of :data:`NAMED`.
      cache_dir: see :func:`models.data.download.cache_folder`. A file that was put there by hand is taken as if it had
        been fetched.

    Raises:
      FileNotFoundError: if it has to be fetched and cannot be.
      ValueError: if the file is not what was published.
    """
    named, folder = NAMED[name], cache_folder(cache_dir)
    found = folder / (named.member or named.file_name)
    if found.is_file():
        return found
    path = folder / named.file_name
    if not path.is_file():
        download(named.url, path, md5=named.md5)
    elif named.md5 is not None:
        check_md5(path, named.md5, what=str(path), advice="delete it to fetch it again")
    if named.member is not None:
        extract(path, found.parent)
    return found
