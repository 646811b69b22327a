# Four images from one file:
#   docker build --target train     -t inception-transfer-train .      the job, CUDA
#   docker build --target serve     -t inception-transfer-serve .      the service, CPU
#   docker build --target serve-gpu -t inception-transfer-serve-gpu .  the service, CUDA
#   docker build --target score-ray -t inception-transfer-score-ray .  bulk scoring on Ray, CPU
# docs/operations.md has the arguments and the sizes.
#
# Debian 12 has the Python 3.11 and the Java 17 that everything here is tested with, and keeps them
# patched. CUDA comes with PyTorch's wheels, of exactly the versions they were built for, so a CUDA
# base would only bring it twice; the driver is the host's. To pin the base to the bit, give
# BASE_IMAGE=debian:12.15-slim@sha256:… with the digest that your registry shows.
ARG BASE_IMAGE=debian:12.15-slim

FROM ${BASE_IMAGE} AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# tini is process 1: it passes SIGTERM on while Python still starts, and reaps what is orphaned.
# Two builds have the same files, as docs/operations.md explains: what differs, logs above all, is
# removed here and below, and bytecode is taken as it is, whatever the time of its source.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates python3 tini \
 && python3 -m compileall -qf --invalidation-mode unchecked-hash /usr/lib/python3* \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/ldconfig/* /var/log/*.log /var/log/apt
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

# Only /opt/venv goes from here into the images; pip stays behind. The bytecode that pip writes has the
# moment of the installation in it. Some packages have files for other versions of Python, which do not
# compile; pip says nothing of those either.
FROM base AS pip
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/installer \
 && python3 -m venv --without-pip /opt/venv
ENV PATH=/opt/installer/bin:$PATH \
    PIP_PYTHON=/opt/venv/bin/python \
    PIP_NO_DEPS=1

FROM pip AS train-packages
RUN --mount=type=bind,source=requirements/train.txt,target=/tmp/requirements.txt \
    --mount=type=cache,target=/root/.cache/pip \
    pip install --no-compile --require-hashes --only-binary :all: --requirement /tmp/requirements.txt \
 && (python -m compileall -qq --invalidation-mode unchecked-hash /opt/venv/lib || true)

FROM pip AS serve-gpu-packages
RUN --mount=type=bind,source=requirements/serve-gpu.txt,target=/tmp/requirements.txt \
    --mount=type=cache,target=/root/.cache/pip \
    pip install --no-compile --require-hashes --only-binary :all: --requirement /tmp/requirements.txt \
 && (python -m compileall -qq --invalidation-mode unchecked-hash /opt/venv/lib || true)

FROM pip AS serve-packages
# PyTorch's own index has torch without CUDA; the hash in serve.txt is that wheel's. Its C++ headers
# and tests, 145 MB, serve nobody here.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=bind,source=requirements/serve.txt,target=/tmp/requirements.txt \
    --mount=type=cache,target=/root/.cache/pip \
    pip install --extra-index-url "$TORCH_INDEX" \
        --no-compile --require-hashes --only-binary :all: --requirement /tmp/requirements.txt \
 && rm -r /opt/venv/lib/python3.11/site-packages/torch/include \
        /opt/venv/lib/python3.11/site-packages/torch/test \
 && (python -m compileall -qq --invalidation-mode unchecked-hash /opt/venv/lib || true)

FROM pip AS score-ray-packages
RUN --mount=type=bind,source=requirements/score-ray.txt,target=/tmp/requirements.txt \
    --mount=type=cache,target=/root/.cache/pip \
    pip install --no-compile --require-hashes --only-binary :all: --requirement /tmp/requirements.txt \
 && (python -m compileall -qq --invalidation-mode unchecked-hash /opt/venv/lib || true)

# Our own code, so that the layer of its dependencies outlives its changes. The service gets its own
# package and the distribution's description, and nothing of training.
FROM pip AS package
RUN --mount=type=bind,source=requirements/build.txt,target=/tmp/requirements.txt \
    pip install --no-cache-dir --require-hashes --requirement /tmp/requirements.txt
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY jobs jobs
COPY serving serving
RUN pip install --no-cache-dir --no-compile --no-build-isolation --target /opt/job . \
 && mkdir /opt/service \
 && cp --recursive --preserve /opt/job/serving /opt/job/*.dist-info /opt/service \
 && python -m compileall -q --invalidation-mode unchecked-hash /opt/job /opt/service

# What both services share; only the packages below differ.
FROM base AS service
# The alternatives of Debian's Java want the folder that slim images lack. Its list of authorities has
# the time of the build in each entry; TorchServe calls nobody.
# hadolint ignore=DL3008
RUN mkdir -p /usr/share/man/man1 \
 && apt-get update \
 && apt-get install --yes --no-install-recommends openjdk-17-jre-headless \
 && rm /etc/ssl/certs/java/cacerts \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/ldconfig/* /var/log/*.log /var/log/apt
ENV MODEL_URI=/models/model.mar \
    HOME=/tmp \
    PYTHONPATH=/opt/service
WORKDIR /
EXPOSE 8080 8082
STOPSIGNAL SIGTERM
# A GPU's worker compiles the network first: minutes, in which no failure counts.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import os; from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open(f'http://127.0.0.1:{os.environ.get(\"SERVING_PORT\", 8080)}/readyz', timeout=4)"]
ENTRYPOINT ["tini", "--", "python", "-m", "serving"]

FROM service AS serve-gpu
# Triton builds the launchers of compiled kernels with it.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/ldconfig/* /var/log/*.log /var/log/apt
COPY --from=serve-gpu-packages /opt/venv /opt/venv
COPY --from=package /opt/service /opt/service
# Read by NVIDIA's container runtime, which mounts the driver; TorchServe counts by nvidia-smi.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
ARG VERSION=0.0.0
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="inception-transfer-serve-gpu" \
      org.opencontainers.image.description="Serves Inception-v3 from a TorchServe archive, on a GPU" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}"

FROM service AS serve
COPY --from=serve-packages /opt/venv /opt/venv
COPY --from=package /opt/service /opt/service
USER 1000:1000
ARG VERSION=0.0.0
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="inception-transfer-serve" \
      org.opencontainers.image.description="Serves Inception-v3 from a TorchServe archive, on a CPU" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}"

FROM base AS score-ray
# Some versions of KubeRay ask with it whether a node is well.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends wget \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/ldconfig/* /var/log/*.log /var/log/apt
COPY --from=score-ray-packages /opt/venv /opt/venv
COPY --from=package /opt/service /opt/service
ENV HOME=/tmp \
    PYTHONPATH=/opt/service
WORKDIR /
USER 1000:1000
ENTRYPOINT ["tini", "--", "python", "-m", "serving"]
CMD ["score", "--help"]
ARG VERSION=0.0.0
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="inception-transfer-score-ray" \
      org.opencontainers.image.description="Scores many pictures on the nodes of a Ray cluster" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}"

FROM base AS train
# Triton builds the launchers of compiled kernels with it.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/ldconfig/* /var/log/*.log /var/log/apt
COPY --from=train-packages /opt/venv /opt/venv
COPY --from=package /opt/job /opt/job
# Downloads and caches go under HOME; where that is not mounted, matplotlib's still need a place.
# Both folders take any user, so that `--user $(id -u)` works with a mounted /runs.
ENV HOME=/cache \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONPATH=/opt/job \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN install --directory --mode=1777 /cache /runs
USER 1000:1000
# For clusters without internet: BAKE_DATA=1 puts CIFAR-10 and the ImageNet weights into HOME.
ARG BAKE_DATA=
RUN if [ -n "$BAKE_DATA" ]; then \
        python -c "from jobs.config import Data; from jobs.data.sources import cifar10; from jobs.train import models; cifar10.load(Data()); models.load_pretrained('imagenet')"; \
    fi
# From here, the job's default `runs` is the folder /runs.
WORKDIR /
ENTRYPOINT ["tini", "--", "python", "-m", "jobs"]
CMD ["run"]
ARG VERSION=0.0.0
ARG COMMIT=unknown
ENV SOURCE_COMMIT=${COMMIT}
LABEL org.opencontainers.image.title="inception-transfer-train" \
      org.opencontainers.image.description="Trains and compares Inception-v3 variants, exports and publishes the best" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}"
