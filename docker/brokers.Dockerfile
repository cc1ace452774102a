# RabbitMQ and Redis from Debian's packages, for `make images-test` without an image registry. The commands and
# variables that the manifests and the compose file use work as in the official images.
ARG BASE=docker.io/library/debian:12.12-slim

FROM ${BASE} AS brokers
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends rabbitmq-server redis-server \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/archives/*.deb \
    && for name in rabbitmq-server rabbitmqctl rabbitmq-diagnostics; do \
        printf '#!/bin/sh\nexec %s "$@"\n' /usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/$name >/usr/local/bin/$name; \
    done \
    && chmod 755 /usr/local/bin/rabbitmq* \
    && install -d -o 999 -g 999 /data /etc/rabbitmq/conf.d \
    && chown -R 999:999 /var/lib/rabbitmq /var/log/rabbitmq
# Debian's wrappers switch the user, which needs root; these are the commands that they wrap.
ENV HOME=/var/lib/rabbitmq \
    RABBITMQ_CONF_ENV_FILE=/dev/null \
    RABBITMQ_LOGS=- \
    RABBITMQ_LOG_BASE=/tmp \
    RABBITMQ_PID_FILE=/tmp/rabbitmq.pid \
    LANG=C.UTF-8
USER 999:999
EXPOSE 5672 6379
CMD ["rabbitmq-server"]
