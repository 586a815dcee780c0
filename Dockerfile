# syntax=docker/dockerfile:1
# Driver and workers: `flink` for Kubernetes, `dataflow` for Dataflow. docs/farm.md has the manifests and commands.
#
#   docker build --target flink    --tag REGISTRY/hardness:flink    .
#   docker build --target dataflow --tag REGISTRY/hardness:dataflow .

ARG PYTHON_VERSION=3.11
# Debian or Ubuntu, whose `python` is of that version and has its headers.
ARG BASE=python:${PYTHON_VERSION}-slim-bookworm
# Those of constraints.txt and pipeline/engines/requirements.txt.
ARG BEAM_VERSION=2.77.0
ARG FLINK_VERSION=1.19.3

FROM apache/beam_python${PYTHON_VERSION}_sdk:${BEAM_VERSION} AS beam

FROM flink:${FLINK_VERSION}-java17 AS flink-distribution

# What `make engines` does for Flink's job server.
FROM maven:3.9-eclipse-temurin-17 AS job-server
WORKDIR /job-server
COPY pipeline/engines/pom.xml ./
RUN mvn --batch-mode --activate-profiles flink package \
    && mv target/job-server-*.jar /flink-job-server.jar


FROM ${BASE} AS worker
# On GPUs torch compiles through Triton, which needs a C compiler whenever it starts.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
# Where Container-Optimized OS (GKE, Dataflow) has the driver's libraries; NVIDIA's own runtime does without.
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /opt/hardness
# The index decides between torch's CUDA and CPU builds; PyPI has CUDA's, with all the CUDA libraries that they need.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
# First what changes rarely: gigabytes. No virtual environment, for Beam's boot would not look into it.
COPY constraints.txt pyproject.toml ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = project['optional-dependencies']; \
print(*project['dependencies'], *extras['s3'], *extras['gcs'], sep='\n')" > requirements.txt \
    && pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt
COPY . ./
RUN pip install --no-cache-dir --no-deps . \
    && hardness-harness --help > /dev/null


# Flink on our Python, and not Python on Flink's image, whose Ubuntu has 3.10.
FROM worker AS flink
RUN groupadd --system --gid 9999 flink \
    && useradd --system --home-dir /opt/flink --uid 9999 --gid flink flink
COPY --from=flink-distribution /opt/java/openjdk /opt/java/openjdk
COPY --from=flink-distribution --chown=flink:flink /opt/flink /opt/flink
COPY --from=flink-distribution /docker-entrypoint.sh /docker-entrypoint.sh
COPY --from=job-server /flink-job-server.jar /opt/hardness/engines/flink-job-server.jar
ENV JAVA_HOME=/opt/java/openjdk \
    FLINK_HOME=/opt/flink \
    HARDNESS_ENGINES=/opt/hardness/engines \
    PATH=/opt/flink/bin:/opt/java/openjdk/bin:$PATH
USER flink
WORKDIR /opt/flink
RUN java -version
EXPOSE 6123 8081
ENTRYPOINT ["/docker-entrypoint.sh"]
CMD ["help"]


FROM worker AS dataflow
ARG BEAM_VERSION
RUN pip install --no-cache-dir --constraint constraints.txt "apache-beam[gcp]==${BEAM_VERSION}"
COPY --from=beam /opt/apache/beam /opt/apache/beam
ENTRYPOINT ["/opt/apache/beam/boot"]
