# Two images from one file:
#   scoring  serves a bundle over HTTP: hvdrec.scoring, numpy, onnxruntime and the HTTP service
#   train    runs every stage, on one machine or many: Horovod, Open MPI, ssh
#
#   docker build --target scoring -t hvdrec-scoring .
#   docker build --target train -t hvdrec-train .
#   docker build --target train --build-arg BASE=nvidia/cuda:12.8.1-devel-ubuntu22.04 \
#       --build-arg CUDA=1 -t hvdrec-train-cuda .          # the base has the CUDA toolkit and NCCL
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS python
ENV DEBIAN_FRONTEND=noninteractive LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
# A base whose distribution has no Python 3.11 needs another package source for it.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.11-minimal libpython3.11-stdlib \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/dpkg.log /var/log/apt
RUN groupadd --gid 10001 hvdrec \
    && useradd --uid 10001 --gid hvdrec --create-home --shell /bin/bash hvdrec

FROM python AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.11-venv python3.11-dev g++ make \
    && rm -rf /var/lib/apt/lists/*

FROM build AS build-scoring
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints-serving.txt ./
COPY hvdrec ./hvdrec
# pip runs from a separate environment, so the image's environment does not contain it.
RUN python3.11 -m venv /installer \
    && python3.11 -m venv --without-pip /opt/hvdrec \
    && /installer/bin/python -m pip --python /opt/hvdrec install --no-cache-dir \
        --only-binary :all: --no-compile --constraint constraints-serving.txt \
        "setuptools>=77" \
    && /installer/bin/python -m pip --python /opt/hvdrec install --no-cache-dir \
        --prefer-binary --no-compile --no-build-isolation \
        --constraint constraints-serving.txt ".[serve,redis,index]" \
    && /installer/bin/python -m pip --python /opt/hvdrec uninstall -y setuptools \
    # Remove what a service never runs: the packages' tests, and tools that convert models.
    && cd /opt/hvdrec/lib/python3.11/site-packages \
    && find . -type d -name tests -prune -exec rm -r {} + \
    && rm -r onnxruntime/transformers onnxruntime/tools onnxruntime/quantization \
    && strip --strip-unneeded uvloop/*.so httptools/parser/*.so

FROM python AS scoring
LABEL org.opencontainers.image.title="hvdrec scoring" \
    org.opencontainers.image.description="Ranks items in a scene from a bundle, over HTTP"
COPY --from=build-scoring /opt/hvdrec /opt/hvdrec
ENV PATH=/opt/hvdrec/bin:$PATH
USER hvdrec
WORKDIR /home/hvdrec
EXPOSE 8080
VOLUME /bundle
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s CMD ["python3.11", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/healthz', timeout=2)"]
# Nothing outside the container could reach its loopback address.
CMD ["hvdrec", "serve", "/bundle", "--host", "0.0.0.0", "--port", "8080"]

FROM build AS build-train
ARG CUDA=
WORKDIR /opt/hvdrec/source
ENV HVDREC_VENV=/opt/hvdrec/environment HVDREC_CACHE=/tmp/cache PIP_NO_CACHE_DIR=1
# Copy only what the environment depends on, so that a change of the code does not rebuild Horovod.
# The package's metadata needs a README.md, which changes often: an empty one does.
COPY pyproject.toml constraints.txt LICENSE ./
COPY scripts/install scripts/build_horovod ./scripts/
COPY scripts/horovod ./scripts/horovod
COPY hvdrec/__init__.py ./hvdrec/__init__.py
RUN touch README.md \
    && scripts/install --extras train,fbgemm,serve,redis,index ${CUDA:+--cuda} \
    && "$HVDREC_VENV/bin/python" -m pip uninstall -qq -y cmake \
    && rm -rf /tmp/cache
COPY README.md ./
COPY scripts ./scripts
COPY configs ./configs
COPY hvdrec ./hvdrec

FROM python AS train
LABEL org.opencontainers.image.title="hvdrec train" \
    org.opencontainers.image.description="From logs to bundles, on Horovod"
RUN apt-get update \
    && apt-get install -y --no-install-recommends openssh-client openssh-server libgomp1 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /etc/ssh/ssh_host_* /var/log/apt
# For several nodes: an sshd that the user starts, with the keys in ~/.ssh and on a port that the
# host's sshd does not use. These settings take precedence over Debian's defaults.
RUN printf '%s\n' 'Port 2222' 'HostKey /home/hvdrec/.ssh/id_ed25519' 'PidFile none' 'UsePAM no' \
        'PasswordAuthentication no' 'KbdInteractiveAuthentication no' 'StrictModes no' \
        'SetEnv PATH=/opt/hvdrec/environment/bin:/usr/local/bin:/usr/bin:/bin' \
        > /etc/ssh/sshd_config.d/hvdrec.conf \
    && printf '%s\n' 'Port 2222' 'BatchMode yes' 'User hvdrec' > /etc/ssh/ssh_config.d/hvdrec.conf
COPY --from=build-train /opt/hvdrec /opt/hvdrec
ENV HVDREC_VENV=/opt/hvdrec/environment PATH=/opt/hvdrec/environment/bin:$PATH
RUN install -d -o hvdrec -g hvdrec /work
USER hvdrec
WORKDIR /work
CMD ["hvdrec", "--help"]
