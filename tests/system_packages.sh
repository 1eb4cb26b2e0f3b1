#!/usr/bin/env bash
# Debian's packages that `make test-cluster` uses, where root and apt allow it; their services are not started. What is
# missing afterwards is skipped by the tests, which say so.
set -euo pipefail

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "system packages: not root, or no apt-get; what is not there is skipped"
  exit 0
fi
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' > "$policy"  # "do not start": Debian's policy-rc.d(8)
  chmod 755 "$policy"
  trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update --quiet=2 && apt-get install --yes --no-install-recommends --quiet=2 \
  slurm-wlm munge iproute2 util-linux prometheus postgresql shellcheck systemd chromium; } >/tmp/system-packages.$$ 2>&1; then
  tail -n 5 "/tmp/system-packages.$$"
  echo "system packages: apt-get failed; what is not there is skipped"
fi
rm -f "/tmp/system-packages.$$"
