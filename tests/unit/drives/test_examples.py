"""The example with the Raspberry Pi's LED, on a folder that looks like its sysfs."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from casync_updater.config.settings import load_settings

EXAMPLES = Path(__file__).parents[3] / "conf" / "examples"


@pytest.mark.parametrize("name", ["ACT", "led0"])
@pytest.mark.parametrize(
    ("when", "trigger", "delay"),
    [("start", "timer", "100"), ("success", "default-on", ""), ("failure", "timer", "1000")],
)
def test_the_light_shows_it(tmp_path: Path, name: str, when: str, trigger: str, delay: str) -> None:
    led = tmp_path / name
    led.mkdir()
    for file in ("trigger", "delay_on", "delay_off"):
        (led / file).write_text("")
    process = subprocess.Popen(
        [EXAMPLES / "drive-led", when],
        env={"PATH": os.environ["PATH"], "LEDS": str(tmp_path)},
        start_new_session=True,
    )
    try:
        assert process.wait(30) == 0
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # what waits for the five minutes
        except ProcessLookupError:
            assert when == "start"
    found = [(led / file).read_text().strip() for file in ("trigger", "delay_on", "delay_off")]
    assert found == [trigger, delay, delay]


def test_the_settings_are_right() -> None:
    loaded = load_settings(EXAMPLES / "media.conf")
    assert (loaded.problems, loaded.warnings) == ((), ())
    media = loaded.settings.media
    assert media.labels == ("UPDATES",)
    assert media.on_failure == "/usr/local/bin/drive-led failure"
