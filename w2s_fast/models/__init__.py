"""Models: Hugging Face causal LMs, run by their own code with keys and values in pages.

Owns loading, the probe that says whether pages can serve a model, its body and its LM head, and
:class:`PagedModel`, one model over one pool: tokens are appended to slots, hidden states come out.
The room knows no sampling, no beams and no text.
"""

from w2s_fast.models.activations import activations_of
from w2s_fast.models.adapters import (
    Adapter,
    AdapterFiles,
    check_adapter,
    find_adapter,
    read_adapter,
)
from w2s_fast.models.body import Body, run_body
from w2s_fast.models.cores import Cores, usable_cores
from w2s_fast.models.deltas import LowRank
from w2s_fast.models.files import find_files
from w2s_fast.models.forwards import onednn
from w2s_fast.models.inference import inference
from w2s_fast.models.limits import main_memory
from w2s_fast.models.load import (
    ModelSource,
    check_shardable,
    device_of_rank,
    exact_device,
    load_model,
    load_tokenizer,
    look_at_model,
    pick_device,
    pick_dtype,
    read_as,
)
from w2s_fast.models.memory import (
    activation_bytes,
    free_bytes,
    kv_tokens_that_fit,
    total_bytes,
    usual_pass_tokens,
    usual_rows,
)
from w2s_fast.models.model import PagedModel
from w2s_fast.models.passes import forward_in_passes
from w2s_fast.models.ranks import Ranks
from w2s_fast.models.together import Groups

__all__ = [
    "Adapter",
    "AdapterFiles",
    "Body",
    "Cores",
    "Groups",
    "LowRank",
    "ModelSource",
    "PagedModel",
    "Ranks",
    "activation_bytes",
    "activations_of",
    "check_adapter",
    "check_shardable",
    "device_of_rank",
    "exact_device",
    "find_adapter",
    "find_files",
    "forward_in_passes",
    "free_bytes",
    "inference",
    "kv_tokens_that_fit",
    "load_model",
    "load_tokenizer",
    "look_at_model",
    "main_memory",
    "onednn",
    "pick_device",
    "pick_dtype",
    "read_adapter",
    "read_as",
    "run_body",
    "total_bytes",
    "usable_cores",
    "usual_pass_tokens",
    "usual_rows",
]
