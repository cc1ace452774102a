"""RabbitMQ: the client, the topology, users and permissions."""

__all__ = ["access", "client", "session_keys", "topology"]
