"""A device in a virtual machine whose updates come on USB drives, and the drives."""

import json
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from casync_updater.clock import SystemClock
from casync_updater.cycle.inspect import inspect
from support.signed import Publisher, copy
from support.world import make_small_tree
from system.vm import VirtualMachine, make_drive

LABEL = "UPDATES"
POINT = f"/run/media/casync-updater/{LABEL}"
FOLDER = "offline"
"""Where on a drive the updates are: a drive that only has the label has no such folder."""

_LED = "/run/led"
_PATIENCE = 400.0
"""Seconds. Processors are emulated, and a visit alone has four processes of Python."""
_SETTINGS = f"""\
[online]
enabled = no
[fetch]
connect_timeout = 1
retries = 0
[media]
labels = {LABEL}, My Own, "a$b`c;d, e"
on_start = echo start $CASYNC_UPDATER_DRIVE >> {_LED}
on_success = echo success >> {_LED}
on_failure = echo failure >> {_LED}
"""


class Stick:
    """A device without a network, its publisher, and a workshop for drives.

    Attributes:
        machine: the device; it runs.
    """

    def __init__(self, machine: VirtualMachine, folder: Path) -> None:
        self.machine = machine
        self.folder = folder
        folder.mkdir()
        self.publisher = Publisher(folder / "publisher")
        self._drives = 0
        keyring = "/etc/casync-updater/keyrings/publisher.gpg"
        machine.write(keyring, self.publisher.keys.keyring.read_bytes())
        machine.write("/etc/casync-updater/casync-updater.conf.d/usb.conf", _SETTINGS)
        self._entry = {
            "interval": 86_400_000,
            "project": "tree",
            "srcIndex": "http://127.0.0.1:9/tree.caidx",
            "srcStore": "http://127.0.0.1:9/store.castr",
            "signedBy": keyring,
        }
        self.configure(LABEL)

    def configure(self, label: str) -> None:
        """Let the only entry have its backup on a drive of this label; the device is as new."""
        place = f"/run/media/casync-updater/{label}/{FOLDER}"
        entry = self._entry | {
            "backupIndex": f"{place}/tree.caidx",
            "backupStore": f"{place}/store.castr",
            "dstPath": "/opt/tree",
        }
        self.machine.write("/etc/casync-updater/usb.json", json.dumps(entry))
        self.machine.run("systemctl", "stop", "casync-updater")
        self.machine.run("sh", "-c", "rm -rf /opt/tree /opt/.tree* /var/lib/casync-updater/*")
        self.machine.run("systemctl", "start", "casync-updater")
        self.idle()

    def publish(self, number: int, *, large: int = 0, stranger: bool = False) -> Path:
        """A version; gives a folder that holds it as a drive does."""
        name = f"{number}.0"
        tree = self.folder / f"tree-{number}"
        if not tree.exists():
            make_small_tree(tree, number)
            rng = random.Random(number)
            for one in range(large):
                (tree / f"large-{one}").write_bytes(rng.randbytes(200_000))
        keys = self.publisher.strangers if stranger else None
        site = self.folder / ("foreign" if stranger else "site")
        self.publisher.publish(site, tree, version=name, keys=keys)
        self._drives += 1
        target = self.folder / f"content-{self._drives}" / FOLDER
        target.parent.mkdir()
        return copy(site, target)

    def drive(self, content: Path | None, filesystem: str = "vfat", label: str = LABEL) -> Path:
        """The image of a drive."""
        self._drives += 1
        image = self.folder / f"drive-{self._drives}"
        files = [] if content is None else [content]
        if filesystem != "exfat":
            make_drive(image, filesystem, label=label, files=files)
            return image
        # No tool puts files onto exfat: the device's own kernel does.
        make_drive(image, filesystem, label="FILLED")
        archive = self.folder / "content.tar"
        subprocess.run(["tar", "-cf", archive, "-C", files[0].parent, files[0].name], check=True)
        self.machine.write("/root/content.tar", archive.read_bytes())
        with self.plugged(image, quiet=True):
            node = "/dev/disk/by-label/FILLED"
            self.until(lambda: self.exists(node), "the drive")
            fill = f"mount {node} /mnt && tar --no-same-owner -xf /root/content.tar -C /mnt"
            self.machine.run("sh", "-c", f"{fill} && umount /mnt")
        partition = self.folder / "partition"
        convert = ["dd", f"if={image}", f"of={partition}", "bs=1M", "skip=1", "status=none"]
        subprocess.run(convert, check=True)
        subprocess.run(["exfatlabel", partition, label], check=True, capture_output=True)
        back = ["dd", f"if={partition}", f"of={image}", "bs=1M", "seek=1", "conv=notrunc"]
        subprocess.run([*back, "status=none"], check=True)
        return image

    @contextmanager
    def plugged(self, image: Path, *, quiet: bool = False, **options: Any) -> Iterator[None]:
        """A drive that is in the device while the block lasts."""
        self.forget()
        self.machine.plug(image.name, image, **options)
        try:
            yield
        finally:
            self.machine.unplug(image.name)
        if not quiet:
            self.until(lambda: self.drives() == [], "the drive to be forgotten")
            assert POINT not in self.machine.output("cat", "/proc/self/mountinfo")

    def until(self, condition: Callable[[], object], what: str, step: float = 0.2) -> None:
        self.machine.wait(condition, what, timeout=_PATIENCE, step=step)

    def exists(self, path: str) -> bool:
        return self.machine.run("test", "-e", path, check=False).returncode == 0

    def forget(self) -> None:
        """What the light showed before."""
        self.machine.run("rm", "-f", _LED)

    def light(self) -> list[str]:
        """What the light shows."""
        return self.machine.output("cat", _LED).split("\n")

    def live(self) -> dict[str, Any]:
        """What the daemon is doing."""
        text = self.machine.output("cat", "/run/casync-updater/daemon.json")
        return dict(json.loads(text)) if text else {}

    def drives(self) -> list[str]:
        """What the daemon says of each drive."""
        return [drive["message"] for drive in self.live().get("drives", [{"message": "?"}])]

    def step(self) -> str:
        """The step that the entry is in."""
        entries = self.live().get("entries", {})
        return str(entries["tree"]["state"]) if "tree" in entries else "?"

    def idle(self) -> None:
        self.until(lambda: self.step() == "idle", "the cycle to end")

    def ended(self, how: str) -> None:
        """Wait for the light at the end of a visit."""

        def seen() -> bool:
            return self.light()[-1] in ("success", "failure")

        self.until(seen, "the end of the visit")
        assert self.light()[-1] == how, f"{self.light()}\n{self.journal()}"

    def journal(self, lines: int = 60) -> str:
        """The newest of what the service said."""
        unit = ("-u", "casync-updater", "-o", "cat")
        return self.machine.output("journalctl", "--no-pager", *unit, "-n", str(lines))

    def installed(self) -> str | None:
        """The version that the device says it has."""
        done = self.machine.run("casync-updater", "status", "--json")
        (entry,) = json.loads(done.stdout)["entries"]
        return None if entry["installed"] is None else str(entry["installed"]["version"])

    def demand(self, version: str) -> None:
        """The device has this version, in every byte."""
        assert self.installed() == version, self.journal()
        done = self.machine.run("tar", "-cf", "/root/tree.tar", "-C", "/opt", "tree")
        assert done.returncode == 0
        archive = self.folder / "found.tar"
        archive.write_bytes(self.machine.read("/root/tree.tar"))
        found = self.folder / "found"
        shutil.rmtree(found, ignore_errors=True)
        found.mkdir()
        subprocess.run(["tar", "-xpf", archive, "-C", found], check=True)
        assert contents(found / "tree") == contents(self.folder / f"tree-{version[:-2]}")

    def on_drive(self, image: Path, filesystem: str = "vfat") -> Path:
        """What is on a drive that is not plugged in."""
        target = self.folder / "inside"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        partition = self.folder / "partition"
        cut = ["dd", f"if={image}", f"of={partition}", "bs=1M", "skip=1", "status=none"]
        subprocess.run(cut, check=True)
        if filesystem == "vfat":
            subprocess.run(["mcopy", "-s", "-n", "-i", partition, "::/*", target], check=True)
        else:
            command = f"rdump / {target}"
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            subprocess.run(["debugfs", "-R", command, partition], check=True, **quiet)  # type: ignore[call-overload]
        return target

    def demand_drive(self, image: Path, version: str, filesystem: str = "vfat") -> Path:
        """The drive is one complete, valid release; gives what is on it."""
        inside = self.on_drive(image, filesystem)
        (found,) = inspect(inside, [self.publisher.keys.keyring], SystemClock())
        assert found.error is None, str(found.error)
        assert found.vouched is not None
        assert found.vouched.release.version == version
        return inside

    def reports(self, inside: Path) -> Sequence[str]:
        folder = inside / "casync-updater-reports"
        return [path.read_text() for path in folder.iterdir()] if folder.is_dir() else []


def contents(tree: Path) -> dict[str, bytes | str]:
    """Files and links of a tree."""
    return {
        str(path.relative_to(tree)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        for path in sorted(tree.rglob("*"))
        if path.is_symlink() or path.is_file()
    }
