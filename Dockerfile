# The HTTP service. For the CPU:   docker build --tag swifti2v .
# For a CUDA card:                 docker build --tag swifti2v:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
# The build needs the network, a run does not: weights come from the volume /models (docs/guides/serving.md).
# Versions are those of requirements.lock (make lock). PyPI's PyTorch is the CUDA build, and the lock has its CUDA
# packages; of another index comes another build of the same version.

ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS build

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=serve,postgresql

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/swifti2v
WORKDIR /source
COPY requirements.lock ./
# First what is large and changes seldom, alone: the indexes of PyTorch's builds do not have all of what it needs.
RUN /opt/swifti2v/bin/pip install --no-deps --index-url "${TORCH_INDEX}" "$(grep '^torch==' requirements.lock)"
RUN /opt/swifti2v/bin/pip install --constraint requirements.lock setuptools
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN /opt/swifti2v/bin/pip install --constraint requirements.lock --no-build-isolation ".[${EXTRAS}]"

FROM python:${PYTHON}-slim

RUN useradd --create-home --uid 10001 swifti2v \
    && install --directory --owner swifti2v --group swifti2v /data /models
COPY --from=build /opt/swifti2v /opt/swifti2v

ENV PATH="/opt/swifti2v/bin:${PATH}" \
    PYTHONUNBUFFERED=1 \
    SWIFTI2V_DATA=/data \
    HF_HOME=/models \
    HF_HUB_OFFLINE=1

USER swifti2v
WORKDIR /data
VOLUME ["/data", "/models"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]

ENTRYPOINT ["swifti2v"]
CMD ["serve", "--host", "0.0.0.0", "--model", "mini"]
