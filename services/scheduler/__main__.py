from services.scheduler.service import serve
from services.scheduler.settings import SchedulerSettings
from shared.runtime.service import run

run("scheduler", SchedulerSettings, serve)
