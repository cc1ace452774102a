"""The load benchmark: sessions that ask over HTTP, and how many of them a way of serving can keep its promises to."""
