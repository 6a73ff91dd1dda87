"""The examples for authors of images, as far as no image has to be built for it.

The system tests build the mmdebstrap and the debos one. What pi-gen and rpi-image-gen read is
checked against the names and fields that their documentation gives.
"""

import configparser
import json
import os
import re
import subprocess
from pathlib import Path

import yaml
from debian.deb822 import Deb822

from casync_updater.config.entries import load_entries

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "conf/examples/images"
ENTRY = IMAGES / "files/etc/casync-updater/myproject.json"
SCRIPTS = [
    *sorted(path for path in IMAGES.rglob("*.sh") if not path.is_symlink()),
    *sorted(path for path in ROOT.glob("debian/*.p*") if path.suffix[1:4] in ("pre", "pos")),
    *(ROOT / "debian/tests" / name for name in ("publish-and-update", "reboot-during-update")),
]


def test_shell_scripts_are_clean() -> None:
    assert len(SCRIPTS) >= 10
    done = subprocess.run(
        ["shellcheck", *SCRIPTS], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_entry_is_valid_but_for_the_keyring(tmp_path: Path) -> None:
    entry = json.loads(ENTRY.read_text())
    assert (IMAGES / f"files{entry.pop('signedBy')}").parent == ENTRY.parent / "keyrings"
    copy = tmp_path / "myproject.json"
    copy.write_text(json.dumps(entry))
    loaded = load_entries(copy)
    assert [entry.name for entry in loaded.entries] == ["myproject"]
    assert not loaded.problems


def test_what_the_readme_names_is_there() -> None:
    text = (IMAGES / "README").read_text()
    named = re.findall(r"^    (\S+)  +\S", text, re.MULTILINE)
    assert {name.rstrip("/") for name in named} == {
        path.name for path in IMAGES.iterdir() if path.name != "README"
    }
    for name in re.findall(r"files/\S+(?=:)", text):
        there = IMAGES / name
        assert there.exists() or there.parent.name == "keyrings", name


def test_no_link_points_out_of_the_folder() -> None:
    for path in IMAGES.rglob("*"):
        assert path.resolve(strict=True).is_relative_to(IMAGES), path


def test_the_entry_and_the_seed_name_the_same_places() -> None:
    script = (IMAGES / "seed.sh").read_text()
    assert f"destination={json.loads(ENTRY.read_text())['dstPath']}\n" in script
    assert f"entry=/{ENTRY.relative_to(IMAGES / 'files')}\n" in script


def test_pi_gen_finds_its_files() -> None:
    """Two digits and a fixed name; what is not executable is passed over without a word."""
    stage = IMAGES / "pi-gen/stage-updates"
    assert {path.name for path in stage.iterdir()} == {"prerun.sh", "EXPORT_IMAGE", "00-updates"}
    assert os.access(stage / "prerun.sh", os.X_OK)
    steps = sorted(path.name for path in (stage / "00-updates").iterdir())
    assert steps == ["00-run.sh", "01-packages", "02-run-chroot.sh", "files"]
    assert os.access(stage / "00-updates/00-run.sh", os.X_OK)
    assert (stage / "00-updates/01-packages").read_text().split() == ["casync-updater"]


def test_rpi_image_gen_finds_its_layer() -> None:
    folder = IMAGES / "rpi-image-gen"
    text = (folder / "layer/myproject-updates.yaml").read_text()
    header = re.search(r"# METABEGIN\n(.*)# METAEND\n---\n", text, re.DOTALL)
    assert header is not None
    fields = Deb822(re.sub(r"^# ?", "", header[1], flags=re.MULTILINE))
    assert set(fields) == {
        f"X-Env-Layer-{name}"
        for name in ("Name", "Category", "Desc", "Version", "Requires", "RequiresProvider")
    }
    layer = yaml.safe_load(text)
    assert layer["mmdebstrap"]["packages"] == ["casync-updater"]
    for hook in layer["mmdebstrap"]["setup-hooks"] + layer["mmdebstrap"]["customize-hooks"]:
        subprocess.run(["sh", "-n", "-c", hook], check=True)
    configuration = yaml.safe_load((folder / "config/myproject.yaml").read_text())
    assert configuration["layer"]["app"] == fields["X-Env-Layer-Name"]
    assert (folder / "files/etc").is_dir()
    assert (folder / "seed.sh").exists()


def test_mkosi_finds_its_files() -> None:
    settings = configparser.ConfigParser()
    settings.optionxform = str  # type: ignore[method-assign, assignment]
    settings.read(IMAGES / "mkosi/mkosi.conf")
    content = settings["Content"]
    assert "casync-updater" in content["Packages"].split(",")
    assert (IMAGES / "mkosi" / content["SkeletonTrees"] / "etc/casync-updater").is_dir()
    assert os.access(IMAGES / "mkosi" / content["PostInstallationScript"], os.X_OK)
    sources = "etc/apt/sources.list.d/casync-updater.sources"
    assert (IMAGES / "mkosi/mkosi.sandbox" / sources).samefile(IMAGES / "files" / sources)
