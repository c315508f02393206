#!/bin/sh
# pip of the Python on PATH, for builds: with the extra CA certificates of the secret `ca` and the settings of the secret
# `pip.conf`, if they are given, and a cache that stays outside of the image.
set -eu
export PIP_CACHE_DIR=/var/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off PIP_ROOT_USER_ACTION=ignore
if [ -s /run/secrets/pip.conf ]; then export PIP_CONFIG_FILE=/run/secrets/pip.conf; fi
if [ -s /run/secrets/ca ]; then
  bundle=$(mktemp)
  trap 'rm -f "$bundle"' EXIT
  cat "$(python -c 'import pip._vendor.certifi as certifi; print(certifi.where())')" /run/secrets/ca >"$bundle"
  export PIP_CERT="$bundle"
fi
python -m pip "$@"
