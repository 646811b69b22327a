#!/usr/bin/env bash
# What `make test-images` needs of Debian 12, once, as root: buildah, podman, a base to build on.
# Of the runtimes only runc works where cgroups are in hybrid mode.
set -euo pipefail
packages=(podman buildah runc netavark aardvark-dns containernetworking-plugins iptables mmdebstrap)
if ! dpkg --status "${packages[@]}" > /dev/null 2>&1; then
  apt-get update --quiet=2
  DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends "${packages[@]}"
fi
