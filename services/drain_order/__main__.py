"""`python -m services.drain_order`"""

from services.drain_order.service import serve
from services.drain_order.settings import DrainOrderSettings
from shared.runtime.service import run

if __name__ == "__main__":
    run("drainorder", DrainOrderSettings, serve)
