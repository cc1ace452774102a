"""`python -m services.scheduler`"""

from services.scheduler.service import serve
from services.scheduler.settings import SchedulerSettings
from shared.runtime.service import run

if __name__ == "__main__":
    run("scheduler", SchedulerSettings, serve)
