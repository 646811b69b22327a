#!/usr/bin/env bash
# benchmarks.gpu on a machine that has Python 3.12, torch and torchvision, and reaches nothing:
#   benchmarks/bare.sh pack FOLDER     here: wheels, and FOLDER's archives, into build/bare (55 MiB)
#   benchmarks/bare.sh run COMMAND …   there, from a copy of the checkout with build/bare in it
# FOLDER has cifar10-jpeg.tar.xz and inception_v3_backbone_fp16.safetensors.xz. For example:
#   benchmarks/bare.sh run python -m benchmarks.gpu --data build/bare/data/cifar10 \
#     --weights build/bare/data/inception_v3_backbone_fp16.safetensors --stages ceilings,scoring
# Left out, as only storage, digits and exports need them: boto3, scikit-learn, scipy.
set -euo pipefail
cd "$(dirname "$0")/.."
bare=build/bare
packages=(
    annotated-doc annotated-types contourpy cycler fonttools jinja2 kiwisolver markdown-it-py
    markupsafe matplotlib mdurl packaging pydantic pydantic-core pygments pyparsing python-dateutil
    pyyaml rich safetensors shellingham six typer typing-extensions typing-inspection urllib3
)

pack() {
    rm -rf "$bare"
    mkdir -p "$bare/wheels"
    platforms=(--platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64)
    python -m pip download --quiet --no-deps --only-binary :all: --python-version 3.12 \
        "${platforms[@]}" --dest "$bare/wheels" "${packages[@]}"
    python -m pip wheel --quiet --no-deps --wheel-dir "$bare/wheels" .  # says which version it is
    cp "$1/cifar10-jpeg.tar.xz" "$1/inception_v3_backbone_fp16.safetensors.xz" "$bare"
    du -sh "$bare"
}

unpack() {
    python -m pip install --quiet --no-index --no-deps --target "$bare/site" "$bare"/wheels/*.whl
    mkdir -p "$bare/data/cifar10"
    tar xJf "$bare/cifar10-jpeg.tar.xz" -C "$bare/data/cifar10"
    xz --decompress --keep --stdout "$bare/inception_v3_backbone_fp16.safetensors.xz" \
        > "$bare/data/inception_v3_backbone_fp16.safetensors"
    touch "$bare/unpacked"
}

case "${1-}" in
    pack) pack "$2" ;;
    run)
        [ -e "$bare/unpacked" ] || unpack
        PYTHONPATH=$bare/site exec "${@:2}"
        ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
