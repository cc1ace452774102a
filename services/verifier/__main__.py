"""`python -m services.verifier`"""

from services.verifier.service import serve
from services.verifier.settings import VerifierSettings
from shared.runtime.service import run

if __name__ == "__main__":
    run("verifier", VerifierSettings, serve)
