"""The private stack on this machine: brokers and services as processes."""
