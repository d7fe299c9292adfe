"""Decoding: rows of one model grow by sampled tokens, with no host between the steps.

Owns the loop over steps, the sampling settings of the rows on the device, and everything that is
recorded: ``recorder`` says what a recorder does, and graphs of passes and of steps stand on it. The
room knows rows with a seed and an index each, and not which request they belong to.
"""

from w2s_fast.decoding.barred import Barred
from w2s_fast.decoding.decode_graphs import DecodeGraphs
from w2s_fast.decoding.decoder import Decoder
from w2s_fast.decoding.decoding import Decoding
from w2s_fast.decoding.draws import Draws
from w2s_fast.decoding.fusion import FusionColumns
from w2s_fast.decoding.graphs import (
    MOST_NEW,
    Recordings,
    most_pass_tokens,
    round_up_rows,
)
from w2s_fast.decoding.growing_rows import GrowingRows
from w2s_fast.decoding.lane import Lane
from w2s_fast.decoding.pass_graphs import PassGraphs
from w2s_fast.decoding.record import RecordedSteps, can_record, record_passes, refuse_compile
from w2s_fast.decoding.recorder import CudaRecorder, Recorder
from w2s_fast.decoding.sampling import SamplingBatch, SamplingColumns
from w2s_fast.decoding.streams import HomeStream

__all__ = [
    "MOST_NEW",
    "Barred",
    "CudaRecorder",
    "DecodeGraphs",
    "Decoder",
    "Decoding",
    "Draws",
    "FusionColumns",
    "GrowingRows",
    "HomeStream",
    "Lane",
    "PassGraphs",
    "RecordedSteps",
    "Recorder",
    "Recordings",
    "SamplingBatch",
    "SamplingColumns",
    "can_record",
    "most_pass_tokens",
    "record_passes",
    "refuse_compile",
    "round_up_rows",
]
