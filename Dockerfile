# glpretrain in a container, with the versions of constraints.txt. Not built by CI, and not built where it was written.
#   docker build --tag glpretrain .                                                                  # for CPUs
#   docker build --tag glpretrain:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .             # for NVIDIA GPUs
#   docker run --rm --volume "$PWD:/work" glpretrain pretrain mmc --data photos/                     # add --gpus all for GPUs
# The wheels of torch on PyPI bring CUDA's libraries, so the base is the same; the host needs NVIDIA's driver and container toolkit.
FROM python:3.11-slim-bookworm

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY glpretrain glpretrain
COPY recipes recipes
RUN pip install --constraint constraints.txt --extra-index-url "$TORCH_INDEX" torch torchvision \
 && pip install --constraint constraints.txt . \
 && rm -r /src/*

RUN useradd --create-home user && mkdir /work && chown user /work
USER user
WORKDIR /work
ENTRYPOINT ["glpretrain"]
CMD ["--help"]
