#!/bin/bash -e

# The repository, the entry and the keyring, before the package that they are for.
cp -R files/. "${ROOTFS_DIR}/"
on_chroot << EOF
apt-get update
EOF
