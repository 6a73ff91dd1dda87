#!/bin/sh
# mmdebstrap.sh SUITE IMAGE [MIRROR...]: a root file system with casync-updater, by mmdebstrap
# (1.3 in Debian 12, 1.5 in Debian 13). IMAGE may be a folder, .tar, .squashfs or .ext2.
set -eu
cd "$(dirname "$0")"

# First: the repository, the entry and the keyring, before the package that they are for.
# Second, optional: the first boot downloads only what has changed since.
# Third: mmdebstrap leaves the build machine's name and name server behind.
# shellcheck disable=SC2016 # mmdebstrap runs the hooks, with the root file system as $1
exec mmdebstrap --variant=apt --include=systemd-sysv,ca-certificates,casync-updater \
    --setup-hook='sync-in files /' \
    --customize-hook='chroot "$1" sh -s <seed.sh' \
    --customize-hook='rm -f "$1/etc/hostname" "$1/etc/resolv.conf"' \
    "$@"
