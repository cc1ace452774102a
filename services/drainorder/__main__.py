"""`python -m services.drainorder`"""

from services.drainorder.service import serve
from services.drainorder.settings import DrainOrderSettings
from shared.service import run

if __name__ == "__main__":
    run("drainorder", DrainOrderSettings, serve)
