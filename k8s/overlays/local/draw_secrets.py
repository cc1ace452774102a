"""Draws the passwords of the overlay `local` into `secrets/`, which git ignores. Existing files are kept."""

from __future__ import annotations

import sys
from pathlib import Path
from secrets import token_urlsafe

SERVICES = ("gateway", "drafter", "scheduler", "estimator", "verifier")
USER = "wisp"


def files() -> dict[str, str]:
    """Return name and text of every file, with new passwords."""
    rabbitmq, redis = token_urlsafe(24), token_urlsafe(24)
    amqp_url = f"WISP_AMQP_URL=amqp://{USER}:{rabbitmq}@rabbitmq:5672/\n"
    redis_url = f"WISP_REDIS_URL=redis://:{redis}@redis:6379/0\n"
    return {
        **{f"{service}.env": amqp_url + redis_url for service in SERVICES},
        "drainorder.env": redis_url,
        "rabbitmq.env": f"RABBITMQ_DEFAULT_USER={USER}\nRABBITMQ_DEFAULT_PASS={rabbitmq}\n",
        "redis.env": f"REDIS_PASSWORD={redis}\n",
    }


def draw(folder: Path) -> bool:
    """Write the files unless they exist; return whether they were written."""
    drawn = files()
    if all((folder / name).is_file() for name in drawn):
        return False
    folder.mkdir(mode=0o700, exist_ok=True)
    for name, text in drawn.items():
        (folder / name).touch(mode=0o600)
        (folder / name).write_text(text)
    return True


if __name__ == "__main__":
    folder = Path(__file__).parent / "secrets"
    print(f"{'drew new passwords into' if draw(folder) else 'passwords are in'} {folder}", file=sys.stderr)
