"""RabbitMQ: the client, the topology, users and permissions."""

__all__ = ["access", "client", "connection", "incoming", "session_keys", "topology"]
