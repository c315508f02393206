#!/usr/bin/env bash
# A base image without a registry: Debian with Python, from the distribution's own mirror. Needs root, debootstrap, docker.
#
#     sudo docker/base-from-debootstrap.sh [TAG]       TAG is sft-dist-base:bookworm
#     make image IMAGE_ARGS="--build-arg CPU_BASE=sft-dist-base:bookworm"
#
# SUITE=bookworm (Python 3.11) or trixie (3.13: newer than the tests have seen); MIRROR=URL; WORK=a folder with 1 GB.
set -euo pipefail
suite=${SUITE:-bookworm}
tag=${1:-sft-dist-base:$suite}
root=$(mktemp -d -p "${WORK:-/var/tmp}")
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv "$suite" "$root/tree" ${MIRROR:+"$MIRROR"}
rm -rf "$root"/tree/var/lib/apt/lists/* "$root"/tree/var/cache/apt/*.bin "$root"/tree/var/cache/apt/archives/*.deb
rm -rf "$root"/tree/usr/share/{doc,man,locale}/*
tar -C "$root/tree" -c . | docker import --change 'CMD ["bash"]' - "$tag"
