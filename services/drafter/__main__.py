from services.drafter.service import serve
from services.drafter.settings import DrafterSettings
from shared.runtime.service import run

run("drafter", DrafterSettings, serve)
