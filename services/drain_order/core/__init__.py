"""The order in which Kubernetes removes verifier pods. Pure: no I/O, no clock."""
