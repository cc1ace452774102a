"""Nothing lost, nothing wrong, whatever fails: `wisp chaos`."""
