# moeyard on the CPU: train, export and serve.
#
#     docker build -t moeyard .
#     docker run --rm -v "$PWD/runs:/work/runs" --entrypoint python moeyard \
#         -m moeyard.training configs/train/tiny.yaml
#     docker run --rm -v "$PWD/runs:/work/runs" moeyard export runs/tiny runs/tiny-model
#     docker run --rm -v "$PWD/runs:/work/runs" -p 8000:8000 --shm-size 2g -e MOEYARD_API_KEY=secret \
#         moeyard serve runs/tiny-model --host 0.0.0.0
#
# TORCH_INDEX_URL: the index of PyTorch's CPU builds, from PyTorch's page on installation. Without
# it, pip takes the build for GPUs, which is several GB larger.
FROM python:3.11-slim

# g++: the C++ kernels are compiled when they are first used. wget: KubeRay looks with it whether Ray is
# well.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ wget \
    && rm -rf /var/lib/apt/lists/*

ARG TORCH_INDEX_URL=""
RUN pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch==2.13.0

COPY . /src
RUN pip install --no-cache-dir -c /src/constraints.txt '/src[serve]'

WORKDIR /work
COPY configs configs
ENTRYPOINT ["moeyard"]
CMD ["--help"]
