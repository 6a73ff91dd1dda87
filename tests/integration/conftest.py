"""Sites that are published once for many tests, and copied by each."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.client import Site
from support.trees import make_tree
from support.webserver import WebServer


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A tree with everything that trees have, published once. Read it, `copy` it."""
    site = Site(tmp_path_factory.mktemp("published"))
    make_tree(site.source, 1, count=10)
    site.publish(version="1.0")
    return site


@pytest.fixture
def site(published: Site, tmp_path: Path) -> Site:
    """A site of the test's own, with version 1.0 of the tree."""
    return published.copy(tmp_path / "publisher")


@pytest.fixture
def server(site: Site) -> Iterator[WebServer]:
    """Serves the site."""
    with WebServer(site.root) as running:
        yield running
