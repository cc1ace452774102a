"""`python -m services.estimator`"""

from services.estimator.service import serve
from services.estimator.settings import EstimatorSettings
from shared.runtime.service import run

if __name__ == "__main__":
    run("estimator", EstimatorSettings, serve)
