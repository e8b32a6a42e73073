# moellava in a container. On a CPU:
#
#     docker build -t moellava .
#     docker run --rm moellava moellava models
#
# With CUDA: a base that has nvcc, which DeepSpeed builds with, and the index of torch for it:
#
#     docker build -t moellava:cuda --build-arg BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04 \
#         --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#
# docs/CLUSTER.md says how to train in it.
ARG BASE=debian:bookworm-slim
# hadolint ignore=DL3006
FROM ${BASE}

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=train,serve,video,data,quant

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive

# A compiler for DeepSpeed's operators, and OpenMPI for its launcher. The base's release says which versions they are.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ git ninja-build numactl openssh-client pdsh \
        python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# torch first: the largest layer, which a change of moellava leaves as it is.
WORKDIR /opt/moellava
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt ./
RUN python3 -m venv "$VIRTUAL_ENV" \
    && python -m pip install -c constraints.txt --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple torch

COPY . .
RUN python -m pip install -c constraints.txt --extra-index-url "$TORCH_INDEX" ".[${EXTRAS}]"

# Data, models and runs are mounted under /work, whose files belong to whoever runs the container (--user).
RUN useradd --create-home --uid 10001 moellava && mkdir /work && chown moellava /work
USER 10001
ENV HOME=/home/moellava HF_HOME=/work/.huggingface TORCH_EXTENSIONS_DIR=/tmp/torch_extensions
WORKDIR /work

# No shell in between: `docker stop` reaches the run, which saves a checkpoint (give it time: --stop-timeout 600).
CMD ["moellava", "--help"]
