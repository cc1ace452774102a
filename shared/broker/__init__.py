"""RabbitMQ: the client, the topology, users and permissions."""

__all__ = ["access", "client", "devices", "session_keys", "topology"]
