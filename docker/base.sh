#!/usr/bin/env bash
# Makes a BASE image from Debian's packages, for machines without an image registry: `docker/base.sh NAME`.
# Needs Debian, root, debootstrap and podman.
set -euo pipefail

name=${1:?usage: docker/base.sh NAME}
folder=$(mktemp -d)
trap 'rm -rf --one-file-system "$folder"' EXIT
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$folder/root" >"$folder/log" ||
    { tail -20 "$folder/log" >&2; exit 1; }
rm -rf "$folder"/root/var/cache/apt/archives/*.deb "$folder"/root/var/lib/apt/lists/* "$folder"/root/usr/share/doc/* \
    "$folder"/root/usr/share/man/* "$folder"/root/usr/share/locale/*
tar -C "$folder/root" -c . | podman import --change 'CMD ["python3"]' - "$name"
