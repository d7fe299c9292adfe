"""Ray: batches on many machines, by Ray Data: a pool of actors, an engine each, on a rank or more.

Owns how prompts are dealt out and results come back, each exactly once, whatever happens to actors
meanwhile. What a search is, an engine knows; where actors run, Ray decides.
"""

from w2s_fast.ray.datasets import generate
from w2s_fast.ray.engines import Engines
from w2s_fast.ray.group import RankGroup
from w2s_fast.ray.pool import Pool, connected, gpus_of, run_there

__all__ = ["Engines", "Pool", "RankGroup", "connected", "generate", "gpus_of", "run_there"]
