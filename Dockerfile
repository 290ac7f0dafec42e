ARG GO_IMAGE=golang:1-alpine
ARG PYTHON_IMAGE=python:3-alpine

# --- TigrisFS, built for the image's platform on the builder's own (a classic builder names neither) ---
FROM --platform=${BUILDPLATFORM:-linux} ${GO_IMAGE} AS tigrisfs

ARG TIGRISFS_VERSION=1.2.1
# Of the module as a whole, as `go mod download -json` has it; its go.sum pins all others.
ARG TIGRISFS_SUM=h1:Rz0zpR/AXPl3Ek0eGbnB6CS8ciFfaCzhgaIO5PxOvmM=

WORKDIR /build
# `go install` refuses a module whose go.mod replaces others; a copy of it is a main module, which it can build.
RUN go mod download -json "github.com/tigrisdata/tigrisfs@v${TIGRISFS_VERSION}" > module.json; cat module.json; \
    grep -qF "\"Sum\": \"${TIGRISFS_SUM}\"" module.json \
    && cp -R "$(sed -n 's/^\t"Dir": "\(.*\)",*$/\1/p' module.json)" source

WORKDIR /build/source
RUN go mod download

ARG TARGETOS
ARG TARGETARCH
RUN CGO_ENABLED=0 GOOS="${TARGETOS}" GOARCH="${TARGETARCH}" go build -trimpath -buildvcs=false -o /build/tigrisfs \
    -ldflags "-s -w -X github.com/tigrisdata/tigrisfs/core/cfg.Version=${TIGRISFS_VERSION}" .

# --- The image ---
FROM ${PYTHON_IMAGE}

LABEL org.opencontainers.image.title="s3borgbackup" \
    org.opencontainers.image.description="Backs up an S3 bucket to one or more S3 buckets with BorgBackup and TigrisFS"

# No versions are pinned: each Alpine release has one, and its fixes are wanted. What must hold of borg is checked.
# hadolint ignore=DL3018
RUN apk add --no-cache borgbackup ca-certificates fuse3 tzdata \
    && case "$(borg --version)" in "borg 1."[4-9].* | "borg 1."[1-9][0-9].*) borg --version ;; *) exit 1 ;; esac

# Where borg keeps what it knows about repositories (/config/borg) and its cache (/cache/borg).
ENV XDG_CONFIG_HOME=/config \
    XDG_CACHE_HOME=/cache \
    PYTHONUNBUFFERED=1
# The buckets are mounted below /data: /data/source, /data/target-NAME. As a volume it can be written to where the image
# cannot (--read-only).
VOLUME ["/config", "/cache", "/data"]
WORKDIR /data

# The file that changes most often is the last layer.
COPY --from=tigrisfs /build/tigrisfs /usr/local/bin/
COPY backup.py /usr/local/bin/

# A container does one run and ends: its exit code tells how that went.
HEALTHCHECK NONE

ENTRYPOINT ["/usr/local/bin/backup.py"]
