"""`python -m services.baseline`"""

from services.baseline.service import serve
from services.baseline.settings import BaselineSettings
from shared.runtime.service import run

if __name__ == "__main__":
    run("baseline", BaselineSettings, serve)
