# outrider serve for CPUs, with native libraries compiled here, as a user without rights.
#   docker build --tag outrider .
#   docker run --rm --publish 8000:8000 --env OUTRIDER_API_KEY=... --volume /path/to/models:/models:ro outrider serve \
#     --host 0.0.0.0 --target /models/target
# A public address needs a key: without OUTRIDER_API_KEY it ends with a sentence.
FROM python:3.13-slim-bookworm AS build
# The release of the base image fixes the compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY LICENSES LICENSES
COPY src src
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.13-slim-bookworm
COPY constraints.txt /tmp/
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python -m pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
    --constraint /tmp/constraints.txt "$(echo /wheels/*.whl)[serve,grammar]" \
    && useradd --system --uid 10001 --create-home outrider
USER 10001
WORKDIR /home/outrider
ENV HF_HUB_OFFLINE=1
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=5m --interval=10s --timeout=5s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["outrider"]
CMD ["serve", "--host", "0.0.0.0"]
