"""`python -m services.drafter`"""

from services.drafter.service import serve
from services.drafter.settings import DrafterSettings
from shared.runtime.service import run

if __name__ == "__main__":
    run("drafter", DrafterSettings, serve)
