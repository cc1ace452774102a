from services.estimator.service import serve
from services.estimator.settings import EstimatorSettings
from shared.service import run

run("estimator", EstimatorSettings, serve)
