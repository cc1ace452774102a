"""A device outside the cluster: the API on its loopback, and drafting for what it asks itself."""
