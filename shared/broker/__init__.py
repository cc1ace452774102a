"""RabbitMQ: the client, the topology, users and permissions."""

__all__ = ["access", "client", "connection", "session_keys", "topology"]
