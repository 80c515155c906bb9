# An image with everything that the program needs, for machines with NVIDIA GPUs and without. How to build and run it, also as any
# user and read-only, stands in docs/containers.md.
#
#   docker build -t tdds .
#   docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" -v "$PWD:/work" tdds tdds collect config.yaml
#
# torch's wheels bring the CUDA libraries, the host brings the driver; g++ stays in the image, since Triton compiles with it.
FROM debian:bookworm-slim

WORKDIR /opt/tdds_dist
# what .dockerignore lets through
COPY . .
RUN PIP_NO_CACHE_DIR=1 scripts/setup.sh && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/tdds_dist/.venv/bin:$PATH \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /work
CMD ["tdds", "--help"]
