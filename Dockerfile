# syntax=docker/dockerfile:1
# SPDX-License-Identifier: Apache-2.0
#
#   docker build -t lora-megatron .                        # GPUs: NVIDIA's PyTorch, apex, Transformer Engine, DeepSpeed
#   docker build --target cpu -t lora-megatron:cpu .       # slim, for a CPU
#   docker run --gpus all --ipc=host -v "$PWD":/workspace lora-megatron torchrun.sh CONFIG [section.key=value ...]
#
# The package is in /opt/lora-megatron, launch/ and its configurations included; runs are written below /workspace, by a
# user without rights: the mounted folder must be writable for it, or give `docker run --user "$(id -u)"`.

# ---------------------------------------------------------------- CPU
FROM python:3.12.12-slim-bookworm@sha256:593bd06efe90efa80dc4eee3948be7c0fde4134606dd40d8dd8dbcade98e669c AS cpu
ARG TORCH=2.13.0
ARG MEGATRON_CORE=0.16.1
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /opt/lora-megatron

# PyTorch's own index has the build without CUDA, a tenth of the size.
RUN pip install "torch==${TORCH}" --index-url https://download.pytorch.org/whl/cpu

# What changes seldom first: these layers stay while the code changes.
COPY launch/containers/constraints.txt launch/containers/constraints.txt
COPY setup.py pyproject.toml ./
COPY lora_megatron/__init__.py lora_megatron/__init__.py
COPY data_prep/__init__.py data_prep/__init__.py
RUN pip install -c launch/containers/constraints.txt "torch==${TORCH}" "megatron-core==${MEGATRON_CORE}" .

COPY . .
RUN pip install --no-deps --editable .

RUN useradd --create-home trainer && mkdir /workspace && chown trainer /workspace
USER trainer
WORKDIR /workspace
ENV PATH=/opt/lora-megatron/launch:$PATH HOME=/home/trainer PYTHON=python
RUN lora-megatron doctor
CMD ["lora-megatron", "--help"]

# ---------------------------------------------------------------- GPU; the last stage is the default one
# Python 3.12, torch 2.10, CUDA 13.1, NCCL, Transformer Engine. Its torch is kept: nothing below installs another.
FROM nvcr.io/nvidia/pytorch:25.12-py3 AS gpu
ARG MEGATRON_CORE=0.19.2
ARG DEEPSPEED=0.19.8
# NVIDIA's apex; the package of that name on the package index is another project.
ARG APEX=10417aceddd7d5d05d7cbf7b0fc2daad1105f8b4
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /opt/lora-megatron

RUN pip uninstall --yes apex \
    && PIP_CONSTRAINT= APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD=8 NVCC_APPEND_FLAGS="--threads 4" \
       pip install --no-build-isolation --no-deps "apex @ git+https://github.com/NVIDIA/apex.git@${APEX}"

COPY launch/containers/constraints.txt launch/containers/constraints.txt
COPY setup.py pyproject.toml ./
COPY lora_megatron/__init__.py lora_megatron/__init__.py
COPY data_prep/__init__.py data_prep/__init__.py
# The base image holds its packages with /etc/pip/constraint.txt (PIP_CONSTRAINT): ours are those that it does not name.
# torch stays the one that it came with, whatever a dependency asks for.
RUN touch /etc/pip/constraint.txt \
    && awk -F '[ =<>!~@;\[]+' '{ gsub(/_/, "-", $1); name = tolower($1) } \
           FILENAME == ARGV[1] { base[name]; next } !(name in base)' \
           /etc/pip/constraint.txt launch/containers/constraints.txt > /tmp/constraints.txt \
    && python -c "import torch; print(f'torch=={torch.__version__}')" >> /tmp/constraints.txt \
    && pip install -c /tmp/constraints.txt "megatron-core==${MEGATRON_CORE}" "deepspeed==${DEEPSPEED}" . \
    && rm /tmp/constraints.txt

COPY . .
RUN pip install --no-deps --no-build-isolation --editable .

RUN useradd --create-home trainer && mkdir --parents /workspace && chown trainer /workspace
USER trainer
WORKDIR /workspace
ENV PATH=/opt/lora-megatron/launch:$PATH HOME=/home/trainer PYTHON=python
RUN lora-megatron doctor
CMD ["lora-megatron", "--help"]
