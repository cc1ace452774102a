"""Metrics of the connection to RabbitMQ."""

from prometheus_client import Counter

PUBLISHED = Counter("wisp_messages_published", "Messages published, a group of results counted once", ["type"])
RECEIVED = Counter("wisp_messages_received", "Messages received, a group of results counted once", ["type"])
