from services.estimator.service import serve
from services.estimator.settings import EstimatorSettings
from shared.runtime.service import run

run("estimator", EstimatorSettings, serve)
