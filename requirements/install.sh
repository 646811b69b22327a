#!/bin/sh
# Makes the environment that `make` uses, or goes on with a half-made one:
#   PYTHON=python3 VENV=.venv requirements/install.sh EXTRA...
#
# uv installs, as it takes a seventh of pip's time. Versions are those of the images' locks, so that no
# new release of a library can break anybody's first command; what only tests need is not locked.
# TORCH_BACKEND=cpu takes PyTorch without CUDA, from PyTorch's own index.
set -eu
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
here=$(dirname "$0")

fail() {
  echo "error: $*" >&2
  exit 1
}

command -v "$PYTHON" > /dev/null || fail "$PYTHON is not installed; Python 3.11 to 3.13 is needed, and PYTHON=... names one"
"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
  fail "$("$PYTHON" -V) is not supported: Python 3.11 to 3.13 is needed, and PYTHON=python3.12 names another"

if [ -e "$VENV/.installing" ]; then
  echo "The last installation was not completed; every package is installed again."
  again=--reinstall
else
  again=
  if [ "${TORCH_BACKEND:-}" = cpu ]; then needed=3; else needed=8; fi
  free=$(($(df -Pk . | awk 'END { print $4 }') / 1048576))
  [ -x "$VENV/bin/uv" ] || [ "$free" -ge "$needed" ] ||
    fail "the disk is too full: $VENV takes $needed GB, $free are free (TORCH_BACKEND=cpu takes 3, without CUDA)"
fi

if [ ! -x "$VENV/bin/uv" ]; then
  echo "Installing into $VENV, once: 3 GB to fetch, 7 on the disk, as PyTorch's build on PyPI brings CUDA, GPU or"
  echo "not. TORCH_BACKEND=cpu leaves CUDA out (0.3 GB to fetch), where download.pytorch.org is reached."
  "$PYTHON" -m venv "$VENV" || fail "$PYTHON cannot make environments; on Debian: apt install python3-venv"
  said=$("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check 'uv>=0.13,<0.14' 2>&1) ||
    fail "no uv from the package registry: $(echo "$said" | tail -n 1)"
fi

# Who has told pip of a mirror need not tell uv.
mirror=${PIP_INDEX_URL:-$("$VENV/bin/python" -m pip config get global.index-url 2> /dev/null || true)}
[ -z "$mirror" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$mirror}"

locks=
for lock in train serve-gpu; do
  sed -n 's/^\([a-z0-9.-]*==[^ ;]*\).*/\1/p' "$here/$lock.txt" > "$VENV/$lock.txt"
  locks="$locks --constraint $VENV/$lock.txt"
done

touch "$VENV/.installing"
# shellcheck disable=SC2086 - words, not one word
"$VENV/bin/uv" pip install --python "$VENV/bin/python" ${TORCH_BACKEND:+--torch-backend "$TORCH_BACKEND"} \
  $again $locks --editable ".[$(echo "$*" | tr ' ' ',')]" ||
  fail "the installation failed, see above; the same command resumes it"
rm "$VENV/.installing"
