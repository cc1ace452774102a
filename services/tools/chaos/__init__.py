"""The chaos tool, `wisp chaos`: faults under load, and a check that no token is lost or wrong."""
