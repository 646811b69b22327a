#!/usr/bin/env bash
# build.sh WORKDIR: installs what the node needs and builds Kubernetes into WORKDIR/bin, once.
# Debian 12 has Kubernetes 1.20 in source only, with everything that it is built from; some 6 minutes
# on one core, as root.
set -euo pipefail
work=$(mkdir -p "${1:?WORKDIR}" && cd "$1" && pwd)
components=(kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy)
packages=(golang-go rsync etcd-server containerd containernetworking-plugins runc catatonit conntrack
  dpkg-dev iptables iproute2 openssl)
if ! dpkg --status "${packages[@]}" > /dev/null 2>&1; then
  apt-get update --quiet=2
  DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends "${packages[@]}"
fi
missing=()
for component in "${components[@]}"; do
  [ -x "$work/bin/$component" ] || missing+=("$component")
done
[ ${#missing[@]} -gt 0 ] || exit 0

# The sources of the machine's own package lists, kept apart from them.
mkdir -p "$work"/{bin,apt/parts,apt/lists/partial} && cd "$work"
for list in /etc/apt/sources.list.d/*.sources; do
  sed 's/^Types: *deb$/Types: deb-src/' "$list" > "apt/parts/$(basename "$list")"
done
apt=(apt-get -o Dir::Etc::sourcelist=- -o "Dir::Etc::sourceparts=$work/apt/parts"
  -o "Dir::State::lists=$work/apt/lists" -o APT::Sandbox::User=root)
if [ ! -d src ]; then
  "${apt[@]}" update --quiet=2
  "${apt[@]}" source --only-source --target-release bookworm --download-only kubernetes
  dpkg-source --no-check --extract ./kubernetes_*.dsc src
fi

mkdir -p gopath/src/k8s.io
ln -sfn "$work/src" gopath/src/k8s.io/kubernetes
cd gopath/src/k8s.io/kubernetes
export GO111MODULE=off GOFLAGS= GOPROXY=off CGO_ENABLED=0 GOPATH="$work/gopath" GOCACHE="$work/gocache"
# The description of the API is generated, and not part of the source package.
generator=k8s.io/kubernetes/vendor/k8s.io/kube-openapi/cmd/openapi-gen
go build -o "$work/bin/openapi-gen" "$generator"
inputs=$(grep -rl --include='*.go' '+k8s:openapi-gen=' pkg staging | xargs -n1 dirname | sort -u \
  | sed 's#^staging/src/#k8s.io/kubernetes/vendor/#; s#^pkg#k8s.io/kubernetes/pkg#' \
  | grep -vE 'sample-|code-generator|/test|_examples|kube-openapi' | paste -sd,)
"$work/bin/openapi-gen" --logtostderr -h hack/boilerplate/boilerplate.generatego.txt \
  -O zz_generated.openapi -p k8s.io/kubernetes/pkg/generated/openapi -r "$work/violations" -i "$inputs"
for component in "${missing[@]}"; do
  echo "building $component"
  go build -trimpath -ldflags '-s -w' -o "$work/bin/$component" "k8s.io/kubernetes/cmd/$component"
done
rm -rf "$work/gocache"
