from services.verifier.service import serve
from services.verifier.settings import VerifierSettings
from shared.runtime.service import run

run("verifier", VerifierSettings, serve)
