"""The drafter: drafts the next tokens of its sessions and has them verified, round by round, until a session ends."""

__all__ = [
    "control",
    "control_files",
    "core",
    "drafting",
    "hidden",
    "learning",
    "link",
    "service",
    "settings",
    "sources",
]
