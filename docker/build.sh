#!/usr/bin/env bash
# Builds images with docker, podman or buildah: `docker/build.sh [services] [cpu] [cuda]` (default: services and cpu).
#
# Environment:
#   ENGINE           docker, podman or buildah; default: the first that answers
#   PREFIX           prefix of the images' names [localhost/wisp-]
#   BASE, PIP_INDEX_URL, TORCH_CPU_INDEX, TORCH_CUDA_INDEX, MODEL    the Dockerfile's arguments
#   BUILD_OPTIONS    further options for the engine, such as --network=host
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

targets=("$@")
((${#targets[@]})) || targets=(services cpu)
for target in "${targets[@]}"; do
    if [[ ! $target =~ ^(services|cpu|cuda)$ ]]; then
        echo "there is no image $target; the images are services, cpu and cuda" >&2
        exit 2
    fi
done

answers() {
    case $1 in
        docker) docker version ;;
        podman) podman info ;;
        buildah) buildah info ;;
    esac
} >/dev/null 2>&1

if [[ -z ${ENGINE:-} ]]; then
    for ENGINE in docker podman buildah none; do
        answers "$ENGINE" && break
    done
    if [[ $ENGINE == none ]]; then
        echo "Neither docker, podman nor buildah answers. On Debian: apt-get install buildah" >&2
        exit 1
    fi
elif ! answers "$ENGINE"; then
    echo "$ENGINE does not answer; leave ENGINE empty to use the first that does" >&2
    exit 1
fi

version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
arguments=(--build-arg "VERSION=$version" --build-arg "REVISION=$revision")
for name in BASE PIP_INDEX_URL TORCH_CPU_INDEX TORCH_CUDA_INDEX MODEL; do
    [[ -v $name ]] && arguments+=(--build-arg "$name=${!name}")
done
# Docker's format, because OCI images have no health checks.
case $ENGINE in
    docker) command=(docker build) ;;
    podman) command=(podman build --format docker --layers) ;;
    buildah) command=(buildah build --format docker --layers) ;;
esac
read -ra options <<<"${BUILD_OPTIONS:-}"

for target in "${targets[@]}"; do
    echo "building ${PREFIX:-localhost/wisp-}$target:$version with $ENGINE" >&2
    "${command[@]}" "${options[@]}" "${arguments[@]}" --file docker/Dockerfile --target "$target" \
        --tag "${PREFIX:-localhost/wisp-}$target:$version" .
done
