"""`python -m services.gateway`"""

from services.gateway.service import serve
from services.gateway.settings import GatewaySettings
from shared.runtime.service import run

if __name__ == "__main__":
    run("gateway", GatewaySettings, serve)
