"""The gateway's page: a chat that shows speculation at work, the fleet view with its feed, and the documentation."""

__all__: list[str] = []
