"""RabbitMQ: the client, the topology, users and permissions."""
