"""What every service process has: settings, logs, health, tasks, TLS."""
