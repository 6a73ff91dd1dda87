"""The client as a process: install, update, do nothing, adopt, repair."""

from pathlib import Path

from support.client import Appliance, Site, digest_of
from support.trees import make_tree, mutate_tree, snapshot
from support.webserver import WebServer


def test_install_and_update(tmp_path: Path) -> None:
    site = Site(tmp_path / "publisher")
    make_tree(site.source, 1, count=10)
    site.publish()
    with WebServer(site.root) as server:
        appliance = Appliance(tmp_path, server.url)
        end = appliance.update()
        assert end["outcome"] == "updated"
        assert snapshot(appliance.destination, mtimes=True) == snapshot(site.source, mtimes=True)
        assert digest_of(appliance.destination, site) == site.release().digest
        mutate_tree(site.source, 2)
        site.publish()
        assert appliance.update()["outcome"] == "updated"
        assert digest_of(appliance.destination, site) == site.release().digest
