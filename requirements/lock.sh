#!/usr/bin/env bash
# Pins what the images install, every file by its SHA-256: `make lock`, with uv on the PATH.
#   build.txt      what builds our own wheel
#   train.txt      the job with its extras    torch with CUDA, from PyPI
#   serve-gpu.txt  the service on a GPU       torch with CUDA, from PyPI
#   serve.txt      the service on a CPU       torch without CUDA, from PyTorch's own index
#   score-ray.txt  bulk scoring on Ray        no torch
# Where that index is not reached, TORCH_WHEELS names a folder with the wheel.
set -euo pipefail
cd "$(dirname "$0")"
TORCH_CPU=2.13.0+cpu
export UV_CUSTOM_COMPILE_COMMAND="make lock"
ranges=$(mktemp)
trap 'rm -f "$ranges"' EXIT

python3 - > "$ranges" <<'PYTHON'
import tomllib

project = tomllib.load(open("../pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
chosen = [line for extra in ("export", "serving", "score", "ray") for line in extras[extra]]
print(*project["dependencies"], *(r for r in chosen if not r.startswith(project["name"])), sep="\n")
PYTHON

# The Python and the C library of Debian 12, the images' base.
compile() {
  uv pip compile --quiet --generate-hashes --no-annotate --no-emit-index-url \
    --no-emit-find-links --only-binary :all: --python-version 3.11 \
    --python-platform x86_64-manylinux_2_36 "$@"
}

compile build.in --output-file build.txt
compile ../pyproject.toml --extra export --extra cluster --extra signing --extra score \
  --output-file train.txt
compile serve.in <(echo torch) --constraint "$ranges" --constraint train.txt \
  --output-file serve-gpu.txt
compile score-ray.in --constraint "$ranges" --constraint serve-gpu.txt --output-file score-ray.txt
if [ -n "${TORCH_WHEELS:-}" ]; then
  torch_source=(--find-links "$TORCH_WHEELS")
else
  torch_source=(--index https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
fi
compile serve.in <(echo "torch==$TORCH_CPU") --constraint "$ranges" \
  --constraint <(grep -oE '^[a-z0-9-]+==[^ ;]+' serve-gpu.txt | grep -v '^torch==') \
  "${torch_source[@]}" --output-file serve.txt
