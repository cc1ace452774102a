#!/usr/bin/env bash
# Runs `docker compose` or `podman-compose` on docker/compose.yaml. It draws passwords once and keeps them in
# docker/.env, which git ignores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [[ ! -f .env ]]; then
    (umask 077 && for name in RABBITMQ REDIS; do
        echo "WISP_${name}_PASSWORD=$(head -c 24 /dev/urandom | base64 | tr '+/' '-_')"
    done >.env)
fi
if [[ -n ${COMPOSE:-} ]]; then
    read -ra command <<<"$COMPOSE"
elif docker version >/dev/null 2>&1 && docker compose version >/dev/null 2>&1; then
    command=(docker compose)
elif podman info >/dev/null 2>&1 && command -v podman-compose >/dev/null; then
    command=(podman-compose)
else
    echo "Neither docker compose nor podman-compose answers; name another command with COMPOSE=..." >&2
    exit 1
fi
exec "${command[@]}" --file compose.yaml --env-file .env "$@"
