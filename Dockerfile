# docker build -t launchlab .
# docker build -t launchlab --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .       for docker run --gpus all
#
# BASE_IMAGE: a Debian or Ubuntu with Python 3.10 or newer and its venv module. An empty TORCH_INDEX leaves it to pip's configuration.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim

FROM ${BASE_IMAGE} AS packages
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python3 -m venv /opt/venv
COPY requirements.txt /tmp/
# requirements.txt as constraints: its versions, without its tools for tests and notebooks.
RUN /opt/venv/bin/pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -c /tmp/requirements.txt torch
RUN /opt/venv/bin/pip install --no-cache-dir -c /tmp/requirements.txt \
      numpy mpi4py mpich python-dotenv matplotlib rich psutil \
 && cd /opt/venv/lib/python3*/site-packages/torch \
 && rm -rf include test && find bin -type f ! -name torch_shm_manager -delete \
 && /opt/venv/bin/pip uninstall --quiet --yes pip

FROM ${BASE_IMAGE}
# Any --user may write to /out where nothing is mounted there.
RUN useradd --uid 1000 --no-create-home launchlab && mkdir -m 1777 /out
COPY --from=packages /opt/venv /opt/venv
# HOME and USER: a --user that /etc/passwd does not know has neither, and libraries ask for both.
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp USER=launchlab PYTHONUNBUFFERED=1 SAVE=/out/model.pt
WORKDIR /launchlab
COPY LICENSE ./
COPY common common
COPY launchers launchers
COPY benchmarks benchmarks
# Bytecode now: the user who runs it cannot write it.
RUN python -m compileall -q . && ln -s /out out
USER 1000:1000
HEALTHCHECK --interval=30s --timeout=10s CMD ["python", "-I", "-S", "/launchlab/common/container.py", "--health"]
ENTRYPOINT ["python", "-I", "-S", "/launchlab/common/container.py"]
