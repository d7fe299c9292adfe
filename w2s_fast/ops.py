"""Every operator of ``torch.ops.w2s_fast``, registered by this import, and its Python function.

For other engines: ``import w2s_fast.ops`` is all that it takes, and neither transformers nor the
engine is imported. The functions check their arguments and say what these mean; each calls the
operator of its own name, which torch.compile traces through. Tensors on CUDA go to Triton kernels
(pages are copied by CUDA C++), all others to plain torch.

Example::

    import torch, w2s_fast.ops as ops

    logits = torch.randn(2, 32000)
    ops.token_logprob(logits, torch.tensor([3, 14]))  # log p of one token a row, float32 [2]
"""

from w2s_fast.kernels.choose_beta import choose_beta
from w2s_fast.kernels.copy_pages import copy_pages
from w2s_fast.kernels.fuse_logits import fuse_logits
from w2s_fast.kernels.linear_logprob import linear_logprob
from w2s_fast.kernels.linear_logprob_partials import Partials, linear_logprob_partials
from w2s_fast.kernels.paged_attention import SharedSegments, paged_attention
from w2s_fast.kernels.rms_norm import rms_norm
from w2s_fast.kernels.rotate import rotate
from w2s_fast.kernels.sample_tokens import sample_tokens
from w2s_fast.kernels.score_select import ScoreSelection, score_select
from w2s_fast.kernels.select_beams import Selection, select_beams
from w2s_fast.kernels.token_logprob import token_logprob
from w2s_fast.kernels.write_kv import write_kv

__all__ = [
    "Partials",
    "ScoreSelection",
    "Selection",
    "SharedSegments",
    "choose_beta",
    "copy_pages",
    "fuse_logits",
    "linear_logprob",
    "linear_logprob_partials",
    "paged_attention",
    "rms_norm",
    "rotate",
    "sample_tokens",
    "score_select",
    "select_beams",
    "token_logprob",
    "write_kv",
]
