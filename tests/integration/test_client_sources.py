"""Web servers that fail, publications in the middle of a download, interrupted downloads."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from support.client import Appliance, Site, digest_of
from support.trees import mutate_tree, snapshot
from support.webserver import ForwardProxy, Request, WebServer


@pytest.fixture
def appliance(tmp_path: Path, server: WebServer) -> Appliance:
    appliance = Appliance(tmp_path, server.url)
    appliance.impatient()
    return appliance


def chunk_ids(server: WebServer) -> list[str]:
    return [path.rpartition("/")[2].partition(".")[0] for path in server.paths("*.cacnk")]


def updated(site: Site) -> None:
    mutate_tree(site.source, 2)
    site.publish(version="2.0")


class TestRecovers:
    """What a client copes with by trying again."""

    def check(self, site: Site, appliance: Appliance) -> None:
        appliance.impatient(retries=8)
        assert appliance.update()["outcome"] == "updated"
        assert digest_of(appliance.destination, site) == site.release().digest

    def test_every_other_request_fails(
        self, site: Site, server: WebServer, appliance: Appliance
    ) -> None:
        server.fail("*", status=500, every=2)
        self.check(site, appliance)

    def test_cut_bodies(self, site: Site, server: WebServer, appliance: Appliance) -> None:
        server.fail("*", cut=50, every=2)
        self.check(site, appliance)

    def test_stalls(self, site: Site, server: WebServer, appliance: Appliance) -> None:
        server.fail("*.cacnk", stall=100, times=2)
        server.fail("*.release", stall=10, times=1)
        self.check(site, appliance)

    def test_no_answer(self, site: Site, server: WebServer, appliance: Appliance) -> None:
        server.fail("*", silent=True, times=1)
        self.check(site, appliance)

    def test_resets(self, site: Site, server: WebServer, appliance: Appliance) -> None:
        server.fail("*", reset=True, every=3)
        self.check(site, appliance)

    def test_too_many_requests(self, site: Site, server: WebServer, appliance: Appliance) -> None:
        server.fail("*.cacnk", status=429, retry_after=1, times=2)
        self.check(site, appliance)


class TestRefuses:
    """What is not taken: the destination stays the version that it was, to the byte."""

    @pytest.fixture(autouse=True)
    def installed(self, site: Site, appliance: Appliance, server: WebServer) -> None:
        appliance.trigger(".")
        appliance.update()
        appliance.journal.unlink()
        self.before = snapshot(appliance.destination, mtimes=True)
        updated(site)
        server.requests.clear()

    def check(self, appliance: Appliance, code: int, words: str) -> None:
        end = appliance.update(code=code)
        assert words in end["message"]
        assert snapshot(appliance.destination, mtimes=True) == self.before
        assert appliance.log() == []
        status = appliance.status()
        assert words in status["lastError"]
        assert status["installed"]["version"] == "1.0"
        assert appliance.verify() == {}

    def heals(self, site: Site, server: WebServer, appliance: Appliance) -> None:
        server.heal()
        assert appliance.update()["outcome"] == "updated"
        assert digest_of(appliance.destination, site) == site.release().digest
        assert appliance.status()["lastError"] is None

    def test_wrong_bytes(self, site: Site, server: WebServer, appliance: Appliance) -> None:
        server.fail("*.cacnk", corrupt=True)
        self.check(appliance, 4, "store.castr")
        self.heals(site, server, appliance)

    @pytest.mark.parametrize("field", ["Features", "SHA256"])
    def test_a_release_that_was_damaged_on_its_way(
        self, site: Site, server: WebServer, appliance: Appliance, field: str
    ) -> None:
        """It comes with the ETag of the right one: what was stored then must not stay for ever."""
        release = site.beside(".release")
        good, status = release.read_bytes(), release.stat()
        index = site.release().index.sha256
        right, wrong = {
            "Features": ("\nFeatures: ", "\nFeatures: !"),
            "SHA256": (index, index[::-1]),
        }[field]
        assert right.encode() in good
        release.write_bytes(good.replace(right.encode(), wrong.encode()))
        os.utime(release, ns=(status.st_atime_ns, status.st_mtime_ns))
        appliance.update(code=4)
        release.write_bytes(good)
        os.utime(release, ns=(status.st_atime_ns, status.st_mtime_ns))
        self.heals(site, server, appliance)

    def test_an_html_page_as_release(
        self, site: Site, server: WebServer, appliance: Appliance
    ) -> None:
        server.fail("*.release", html=True)
        self.check(appliance, 3, "captive portal")
        self.heals(site, server, appliance)

    def test_an_html_page_as_index(
        self, site: Site, server: WebServer, appliance: Appliance
    ) -> None:
        server.fail("*/by-hash/*", html=True)
        server.fail("*.caidx", html=True)
        self.check(appliance, 3, "captive portal")
        self.heals(site, server, appliance)

    def test_an_html_page_for_everything(
        self, site: Site, server: WebServer, appliance: Appliance
    ) -> None:
        server.fail("*", html=True)
        self.check(appliance, 3, "captive portal")
        server.heal()
        server.fail("*", redirect="http://127.0.0.1:9/login")
        appliance.update(code=3)
        server.heal()
        server.fail("*.cacnk", html=True)
        self.check(appliance, 3, "captive portal")
        self.heals(site, server, appliance)

    def test_one_chunk_is_not_there(
        self, site: Site, server: WebServer, appliance: Appliance
    ) -> None:
        server.fail("*.cacnk", status=404, skip=2, times=2)
        self.check(appliance, 3, ".cacnk")
        self.heals(site, server, appliance)

    @pytest.mark.parametrize("content", [b"", b"no index at all", bytes(104)])
    def test_an_index_that_is_none(
        self, site: Site, server: WebServer, appliance: Appliance, content: bytes
    ) -> None:
        server.fail("*/by-hash/*", body=content)
        server.fail("*.caidx", body=content)
        self.check(appliance, 4, "tree.caidx")
        self.heals(site, server, appliance)

    def test_a_release_that_is_none(
        self, site: Site, server: WebServer, appliance: Appliance
    ) -> None:
        server.fail("*.release", body=b"Format: 1\nSerial: many\n")
        self.check(appliance, 4, "tree.caidx.release")
        self.heals(site, server, appliance)

    def test_the_server_is_down(self, site: Site, server: WebServer, appliance: Appliance) -> None:
        server.close()
        self.check(appliance, 3, server.netloc)

    def test_the_server_fails(self, site: Site, server: WebServer, appliance: Appliance) -> None:
        server.fail("*", status=503)
        self.check(appliance, 3, "503")

    def test_the_release_went_away(
        self, site: Site, server: WebServer, appliance: Appliance
    ) -> None:
        site.beside(".release").unlink()
        self.check(appliance, 3, "--accept-legacy tree")

    def test_an_older_release_is_stale_not_wrong(
        self, site: Site, server: WebServer, appliance: Appliance
    ) -> None:
        old = site.beside(".release").read_bytes()
        mutate_tree(site.source, 3)
        site.publish()
        appliance.update()
        site.beside(".release").write_bytes(old)
        end = appliance.update()
        assert end["outcome"] == "current"
        assert "stale" in end["message"]

    def test_a_release_of_another_project(
        self, site: Site, server: WebServer, appliance: Appliance
    ) -> None:
        site.write("more", "of another project")
        site.publish(project="other")
        self.check(appliance, 4, "refused (project): expected tree, found other")
        assert appliance.status()["refused"]["check"] == "project"
        site.write("more", "of the project")
        site.publish(project="tree")
        appliance.update()
        assert appliance.status()["refused"] is None


def test_first_install_with_a_dead_server(server: WebServer, appliance: Appliance) -> None:
    server.close()
    assert appliance.update(code=3)["outcome"] == "unreachable"
    assert not appliance.destination.exists()
    assert not appliance.staging.exists()


def test_a_publication_in_the_middle_of_a_download(
    site: Site, server: WebServer, appliance: Appliance
) -> None:
    """by-hash: the version that was begun is finished, the next cycle has the new one."""
    first = site.release()
    published = []

    def publish(request: Request) -> None:
        if request.path.endswith(".cacnk") and not published:
            published.append(request)
            updated(site)

    server.on_request = publish
    end = appliance.update()
    assert (end["outcome"], end["version"]) == ("updated", "1.0")
    assert digest_of(appliance.destination, site) == first.digest
    assert appliance.update()["version"] == "2.0"


def test_a_publication_between_release_and_index(
    site: Site, server: WebServer, appliance: Appliance
) -> None:
    published = []

    def publish(request: Request) -> None:
        if "by-hash" in request.path and not published:
            published.append(request)
            updated(site)

    server.on_request = publish
    assert appliance.update()["version"] == "1.0"
    assert appliance.update()["version"] == "2.0"


def test_redirects(site: Site, server: WebServer, appliance: Appliance, tmp_path: Path) -> None:
    with WebServer(site.root) as mirror:
        server.fail("*.cacnk", redirect=f"{mirror.url}/nowhere")
        end = appliance.update(code=3)
        assert "nowhere" in end["message"]
        for chunk in site.chunks():
            path = f"/store.castr/{chunk[:4]}/{chunk}.cacnk"
            server.fail(path, redirect=f"{mirror.url}{path}")
        server.fail("*.release", redirect=f"{mirror.url}/tree.caidx.release")
        assert appliance.update()["outcome"] == "updated"
        assert mirror.paths("*.cacnk")
        assert mirror.paths("*.release")


def test_credentials(site: Site, tmp_path: Path) -> None:
    with WebServer(site.root, credentials=("device", "se/cret")) as server:
        appliance = Appliance(tmp_path, server.url)
        appliance.impatient()
        end = appliance.update(code=3)
        assert "401" in end["message"]
        netrc = tmp_path / "netrc"
        netrc.write_text("machine 127.0.0.1 login device password se/cret\n")
        netrc.chmod(0o600)
        appliance.settings(f"[fetch]\ncredentials = {netrc}\n")
        end = appliance.update()
        assert end["outcome"] == "updated"
        texts = [end["stderr"], appliance.run("status", "--json").stdout]
        texts += [path.read_text("latin-1") for path in appliance.state_dir.rglob("*.json")]
        assert not [text for text in texts if "se/cret" in text]


def test_credentials_in_the_url_are_shown_nowhere(site: Site, tmp_path: Path) -> None:
    with WebServer(site.root, credentials=("device", "secret")) as server:
        appliance = Appliance(tmp_path, server.url.replace("//", "//device:secret@"))
        appliance.impatient()
        end = appliance.update()
        assert end["outcome"] == "updated"
        server.fail("*", status=500)
        failed = appliance.update(code=3)
        texts = [end["stderr"], failed["stderr"], failed["message"]]
        texts += [appliance.run("status").stdout, appliance.run("validate").stdout]
        texts += [path.read_text("latin-1") for path in appliance.state_dir.rglob("*.json")]
        assert not [text for text in texts if "secret" in text]


def test_a_proxy_from_the_environment(site: Site, server: WebServer, tmp_path: Path) -> None:
    with ForwardProxy() as proxy:
        appliance = Appliance(tmp_path, server.url)
        appliance.environment["http_proxy"] = proxy.url
        assert appliance.update()["outcome"] == "updated"
        assert len(proxy.requests) == len(server.requests)


class TestInterrupted:
    """A download goes on where it stopped; nothing that is there is asked for again."""

    CONNECTIONS = 8

    @pytest.fixture(autouse=True)
    def many_chunks(self, site: Site) -> None:
        site.write("more", random.Random(3).randbytes(3_000_000))
        site.publish(version="1.1")

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
    def test_by_a_signal(
        self, site: Site, server: WebServer, appliance: Appliance, number: signal.Signals
    ) -> None:
        server.fail("*.cacnk", delay=0.05)
        total = len(site.chunks())
        with appliance.start("update", "--json") as process:
            deadline = time.monotonic() + 20
            while len(chunk_ids(server)) < total // 2:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(number)
            began = time.monotonic()
            process.wait(10)
            took = time.monotonic() - began
            if number != signal.SIGKILL:
                assert process.returncode == 1
                assert b'"stopped"' in process.communicate()[0]
        assert took < 2
        assert not appliance.destination.exists()
        server.heal()
        first = len(chunk_ids(server))
        assert first < total
        assert appliance.update()["outcome"] == "updated"
        # Fetched ahead and not yet written are those of the window: two per connection.
        assert len(chunk_ids(server)) <= total + 2 * self.CONNECTIONS
        assert digest_of(appliance.destination, site) == site.release().digest

    def test_by_a_server_that_goes_away(
        self, site: Site, server: WebServer, appliance: Appliance
    ) -> None:
        total = len(site.chunks())
        server.fail("*.cacnk", skip=total // 2, reset=True)
        appliance.update(code=3)
        server.heal()
        good = [r for r in server.requests if r.path.endswith(".cacnk") and r.status == 200]
        appliance.update()
        again = [r for r in server.requests if r.path.endswith(".cacnk") and r.status == 200]
        assert len(again) <= total + 2 * self.CONNECTIONS
        assert len(good) >= total // 2

    def test_by_a_new_version(self, site: Site, server: WebServer, appliance: Appliance) -> None:
        """What was fetched of a version that is gone serves the next one, as far as it can."""
        total = len(site.chunks())
        server.fail("*.cacnk", skip=total // 2, reset=True)
        appliance.update(code=3)
        server.heal()
        updated(site)
        assert appliance.update()["version"] == "2.0"
        good = [r for r in server.requests if r.path.endswith(".cacnk") and r.status == 200]
        assert len(good) <= len(site.chunks()) + 2 * self.CONNECTIONS
        assert not list((appliance.state_dir / "cache").rglob("*.cacnk"))
