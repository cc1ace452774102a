"""The twin of a target: it takes the time of a hardware profile and answers without a model."""

__all__ = ["computed", "engine", "files", "folder", "lateness", "layout", "profile", "spec", "text", "trace"]
