"""Coverage-guided fuzzing of every parser that reads bytes from somewhere else.

    make fuzz SECONDS=300 SEED=1
    PYTHONPATH=src:tests build/fuzz/bin/python -m fuzz.run release --seconds 60

Each target runs in a process of its own, under libFuzzer by way of atheris (from PyPI: Debian
has no coverage-guided fuzzer for Python), from seeds that the tests' own tools make. A finding is
an exception that the parser's callers do not expect, an input that takes longer than `LIMIT`
seconds, or one that takes `MEMORY` MiB; the input is kept in `--findings`. What was found and
mended is among the unit tests of the parser. The exit code is 0 where nothing was found.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("atheris is not installed here: 'make fuzz' gets it")

with atheris.instrument_imports(include=["casync_updater", "fuzz"]):
    from fuzz.targets import SIZE, TARGETS

LIMIT = 20
MEMORY = 1024


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the parsers.")
    parser.add_argument("target", nargs="*", help="all of them where none is named")
    parser.add_argument("--seconds", type=int, default=120, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path("build/findings"))
    parser.add_argument("--child", metavar="CORPUS", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return _child(arguments)
    failed = 0
    for name in arguments.target or TARGETS:
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_memory()) as folder:
            failed += _one(name, Path(folder), arguments)
    return 1 if failed else 0


def _memory() -> str | None:
    """Where files cost least; None for the usual place."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _one(name: str, folder: Path, arguments: argparse.Namespace) -> bool:
    """Fuzz one target; True where something was found."""
    seeds = folder / "seeds"
    seeds.mkdir()
    for number, seed in enumerate(TARGETS[name].seeds(folder)):
        (seeds / str(number)).write_bytes(seed)
    arguments.findings.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "fuzz.run", name, "--child", str(seeds)]
    argv += ["--seconds", str(arguments.seconds), "--seed", str(arguments.seed)]
    argv += ["--findings", str(arguments.findings)]
    if name == "http":
        # Redirects lead anywhere: nowhere is where they get to.
        argv = ["unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "-", *argv]
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, env=environment
    )
    said = done.stdout.decode(errors="replace")
    runs = re.findall(r"^#(\d+)\s", said, re.MULTILINE)
    features = re.findall(r"\bcov: (\d+) ft: (\d+)", said)
    cover, feature = features[-1] if features else ("?", "?")
    print(
        f"{name}: {runs[-1] if runs else 0} executions in {arguments.seconds} s,"
        f" {cover} places, {feature} features: {'FOUND' if done.returncode else 'nothing found'}",
        flush=True,
    )
    if done.returncode:
        found = [line for line in said.splitlines() if not line.startswith(("#", "INFO"))]
        print("\n".join(found[-60:]), flush=True)
    return done.returncode != 0


def _child(arguments: argparse.Namespace) -> int:
    name = arguments.target[0]
    target = TARGETS[name]
    options = [
        sys.argv[0],
        f"-max_total_time={arguments.seconds}",
        f"-seed={arguments.seed}",
        f"-timeout={LIMIT}",
        f"-rss_limit_mb={MEMORY}",
        f"-max_len={SIZE}",
        f"-artifact_prefix={arguments.findings}/{name}-",
        str(arguments.child),
    ]
    atheris.Setup(options, target.accepts)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
