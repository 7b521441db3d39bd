# One image for init, the bootstrap worker and Flower.
#
# The package has its own virtual environment, /opt/bifrost-bootstrap. So BASE_IMAGE may be the platform's image: its
# packages and its pip do not change, it holds the migrations, and its own interpreter (BIFROST_ALEMBIC_PYTHON) runs
# them. BASE_IMAGE must be Debian-based, with a CPython >= 3.11 as `python3`.
ARG BASE_IMAGE=python:3.13-slim

FROM python:3.13-slim AS tini
RUN apt-get update && apt-get install -y --no-install-recommends tini

FROM ${BASE_IMAGE} AS build
USER root
WORKDIR /build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv builder && python3 -m venv --without-pip /opt/bifrost-bootstrap
# The locked packages come before the source, so that a change to the source does not install them again.
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,source=requirements,target=requirements \
    builder/bin/pip install --require-hashes --only-binary :all: -r requirements/build.lock \
 && builder/bin/pip --python /opt/bifrost-bootstrap/bin/python install \
      --require-hashes --only-binary :all: -r requirements/runtime.lock
COPY pyproject.toml README.md LICENSE celeryconfig.py source/
COPY bifrost_bootstrap source/bifrost_bootstrap
RUN builder/bin/pip wheel --no-deps --no-build-isolation --wheel-dir wheel ./source \
 && builder/bin/pip --python /opt/bifrost-bootstrap/bin/python install --no-deps --no-index wheel/*.whl \
 && /opt/bifrost-bootstrap/bin/python -m compileall -q /opt/bifrost-bootstrap/lib

FROM ${BASE_IMAGE} AS runtime
USER root
# Official Python images have no bytecode for the standard library. A read-only container cannot write it, so each start
# would compile it again.
RUN (getent group 10001 || groupadd --gid 10001 bifrost-bootstrap) \
 && (getent passwd 10001 || useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent \
      --shell /usr/sbin/nologin bifrost-bootstrap) \
 && python3 -m compileall -q -x '/(site-packages|dist-packages|test|tests|idlelib|lib2to3|turtledemo)/' \
      "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
COPY --from=tini /usr/bin/tini-static /usr/local/bin/tini
COPY --from=build /opt/bifrost-bootstrap /opt/bifrost-bootstrap
ENV PATH=/opt/bifrost-bootstrap/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
# A health check of the base image would ask its API. The files in deploy/ have ours.
HEALTHCHECK NONE
# Only a minimal init, which forwards signals and reaps orphans. Any command can follow.
ENTRYPOINT ["tini", "--"]
CMD ["bifrost-bootstrap", "init"]

ARG BASE_IMAGE
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="bifrost-bootstrap" \
      org.opencontainers.image.description="Init container of the Bifrost platform: migrates the schema, warms the module cache" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# The image for `rehearse` (`docker build --target rehearse`): it has the embedded PostgreSQL and its pg_dump too.
FROM build AS build-rehearse
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,source=requirements,target=requirements \
    builder/bin/pip --python /opt/bifrost-bootstrap/bin/python install \
      --require-hashes --only-binary :all: -r requirements/rehearse.lock

FROM runtime AS rehearse
COPY --from=build-rehearse /opt/bifrost-bootstrap /opt/bifrost-bootstrap
CMD ["bifrost-bootstrap", "rehearse"]

# Without a target, `docker build` makes the last stage.
FROM runtime
