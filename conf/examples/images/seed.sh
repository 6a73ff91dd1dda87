#!/bin/sh
# Puts what is published now into an image, so that a device's first boot downloads only what
# has changed since. It runs in the image that is being built (by chroot), as root.
#
# No state stays behind: that of the build would describe the build machine's disk. The device
# finds the tree, and adopts it where it is what is published, or builds the newer one from it.
set -eu

entry=/etc/casync-updater/myproject.json
destination=/opt/myproject

seed=$(mktemp -d)
trap 'rm -rf "$seed"' EXIT
# Neither actions nor drives: they are the running device's.
python3 - "$entry" >"$seed/seed.json" <<'END'
import json
import sys

with open(sys.argv[1]) as file:
    entry = json.load(file)
for key in ("triggers", "startup", "healthCheck", "backupIndex", "backupStore"):
    entry.pop(key, None)
print(json.dumps(entry))
END
casync-updater --config "$seed/seed.json" --state-dir "$seed/state" \
    --settings /etc/casync-updater/casync-updater.conf update
rm -r "$(dirname "$destination")/.$(basename "$destination").casync-updater"
