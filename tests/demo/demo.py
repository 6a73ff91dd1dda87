"""The main job on real parts, told as a story: `make demo`.

The real casync publishes a real tree, nginx serves it on loopback, and the real daemon installs
and updates it, runs what the changes trigger, and goes on from a drive when the server is gone.
A drive that was tampered with is refused. Everything happens in a temporary folder; nothing is
left behind.
"""

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 30.0


def title(text: str) -> None:
    print(f"\n== {text}\n", flush=True)


def say(text: str) -> None:
    print(f"   {text}", flush=True)


def run(*argv: object, ok: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """Run a program of the project, and show the command with what it says."""
    words = [str(word) for word in argv]
    shown = words[2:] if words[1:2] == ["-m"] else words
    names = {
        "casync_updater": "casync-updater",
        "casync_updater.server": "casync-updater-server",
    }
    print(f"   $ {shlex.join([names.get(shown[0], shown[0]), *shown[1:]])}", flush=True)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    for line in (done.stdout + done.stderr).splitlines():
        print(f"     {line}", flush=True)
    if done.returncode not in ok:
        raise SystemExit(f"demo: exit code {done.returncode}, expected one of {ok}")
    return done


def wait_for(what: str, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > deadline:
            raise SystemExit(f"demo: {what} did not happen within {PATIENCE:g} seconds")
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def web_server(work: Path, site: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Nginx on loopback; gives its URL, and what takes it down for good."""
    port = free_port()
    config = work / "nginx.conf"
    config.write_text(
        f"""
        daemon off; master_process off; pid {work}/nginx.pid; error_log {work}/nginx.err;
        events {{}}
        http {{
          access_log {work}/access.log;
          client_body_temp_path {work}; proxy_temp_path {work}; fastcgi_temp_path {work};
          uwsgi_temp_path {work}; scgi_temp_path {work};
          server {{ listen 127.0.0.1:{port}; root {site}; }}
        }}
        """
    )
    nginx = subprocess.Popen(["/usr/sbin/nginx", "-c", str(config), "-e", f"{work}/nginx.err"])

    def stop() -> None:
        nginx.terminate()
        nginx.wait()

    try:
        wait_for("the start of nginx", lambda: _answers(port))
        yield f"http://127.0.0.1:{port}", stop
    finally:
        stop()


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@contextlib.contextmanager
def daemon(arguments: list[str], log: Path) -> Iterator[None]:
    """The client's daemon, in the foreground of nobody."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "casync_updater", *arguments, "run"],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait(PATIENCE)


def write_software(source: Path, version: str) -> None:
    """A program with a few thousand lines of real code, as a vendor would build it."""
    if not source.exists():
        shutil.copytree("/usr/lib/python3/dist-packages/urllib3", source / "lib/urllib3")
        shutil.copytree("/usr/lib/python3/dist-packages/requests", source / "lib/requests")
        (source / "bin").mkdir()
        (source / "current").symlink_to("bin")
    (source / "VERSION").write_text(f"{version}\n")
    program = source / "bin/hello"
    program.write_text(f"#!/bin/sh\necho hello from {version}\n")
    program.chmod(0o755)


def main() -> None:
    os.environ["PYTHONPATH"] = str(ROOT / "src")
    with tempfile.TemporaryDirectory(prefix="casync-updater-demo-") as folder:
        Path(folder).chmod(0o755)
        with contextlib.ExitStack() as stack:
            story(Path(folder), stack)
    title("Done. Nothing is left behind.")


def story(work: Path, stack: contextlib.ExitStack) -> None:
    source, site, drive = work / "source", work / "www", work / "drive"
    target, actions = work / "device/hello", work / "actions.log"
    for path in (site, drive, target.parent):
        path.mkdir(parents=True)
    python = sys.executable

    title("A vendor publishes version 1.0 of a program, signed")
    write_software(source, "1.0")
    keys = work / "keys"
    owner = "Example Ltd <updates@example.com>"
    run(python, "-m", "casync_updater.server", "keygen", keys, "--owner", owner)
    keyring, secret = keys / "keyring.gpg", keys / "working-secret.asc"
    server = work / "server.json"

    def publish(version: str, news: str, ok: tuple[int, ...] = (0,)) -> None:
        server.write_text(
            json.dumps(
                {
                    "index": f"{site}/hello.caidx",
                    "store": f"{site}/hello.castr",
                    "source": str(source),
                    "version": version,
                    "changes": news,
                    "signKey": str(secret),
                },
                indent=2,
            )
        )
        run(python, "-m", "casync_updater.server", server, ok=ok)

    publish("1.0", "first release")
    publish("1.0", "first release")
    say("The second run found nothing new and published nothing: a nightly job costs nothing.")

    title("A web server serves the files, and a device has this configuration")
    url, stop_server = stack.enter_context(web_server(work, site))
    client = work / "client.json"
    client.write_text(
        json.dumps(
            {
                "interval": 1000,
                "srcIndex": f"{url}/hello.caidx",
                "srcStore": f"{url}/hello.castr",
                "backupIndex": f"{drive}/hello.caidx",
                "backupStore": f"{drive}/hello.castr",
                "dstPath": str(target),
                "signedBy": str(keyring),
                "triggers": [
                    {"paths": ["bin"], "actions": [f"{target}/bin/hello >> {actions}"]},
                    {"paths": ["lib"], "actions": [f"echo the library changed >> {actions}"]},
                ],
                "startup": [f"echo started >> {actions}"],
            },
            indent=2,
        )
    )
    print("     " + client.read_text().replace("\n", "\n     "))
    common = ["--config", str(client), "--state-dir", str(work / "state")]
    client_command = [python, "-m", "casync_updater", *common]
    run(*client_command, "validate")

    title("The daemon starts: it installs the program and fills the backup drive")
    log = work / "daemon.log"

    def version() -> str:
        path = target / "VERSION"
        return path.read_text().strip() if path.exists() else "nothing"

    def logged() -> list[str]:
        return actions.read_text().splitlines() if actions.exists() else []

    with daemon(common, log):
        wait_for("the first installation", lambda: "started" in logged())
        wait_for("the copy on the drive", (drive / "hello.caidx.release").exists)
        run(target / "bin/hello")
        say(f"actions so far: {logged()}")

        title("Version 1.1: one program changes, the library does not")
        actions.write_text("")
        write_software(source, "1.1")
        publish("1.1", "hello says more")
        wait_for("the update to 1.1", lambda: version() == "1.1" and bool(logged()))
        say(f"the daemon's next cycle installed {version()}; actions: {logged()}")
        assert logged() == ["hello from 1.1"], "only the trigger of bin may have run"
        released = (site / "hello.caidx.release").read_bytes()
        wait_for(
            "the refresh of the drive",
            lambda: (drive / "hello.caidx.release").read_bytes() == released,
        )
    for line in log.read_text().splitlines():
        print(f"     {line}")

    title("The server is gone. A colleague brings 1.2 on the drive")
    write_software(source, "1.2")
    publish("1.2", "for devices without a network")
    stop_server()
    for path in site.glob("hello.caidx*"):
        shutil.copyfile(path, drive / path.name)
    shutil.copytree(site / "hello.castr", drive / "hello.castr", dirs_exist_ok=True)
    run(*client_command, "update")
    run(target / "bin/hello")
    assert version() == "1.2"

    title("Somebody edits the drive: 1.3 with a program of his own")
    write_software(source, "1.3")
    (source / "bin/hello").write_text("#!/bin/sh\necho evil\n")
    server_evil = json.loads(server.read_text()) | {
        "index": f"{drive}/hello.caidx",
        "store": f"{drive}/hello.castr",
        "version": "1.3",
    }
    del server_evil["signKey"]
    (drive / "hello.caidx.release").unlink()
    server.write_text(json.dumps(server_evil))
    run(python, "-m", "casync_updater.server", server)
    run(*client_command, "update", ok=(4,))
    run(target / "bin/hello")
    assert version() == "1.2"
    say("Refused, with exit code 4: the device still runs what the vendor signed.")

    title("And back to the version before")
    run(*client_command, "rollback", "hello")
    run(target / "bin/hello")
    run(*client_command, "status")
    run(*client_command, "verify", "hello")
    assert version() == "1.1"


if __name__ == "__main__":
    main()
