"""Logits processing: from a request's sampling parameters and the logits to distributions."""

from outrider.moved import names_of
from outrider.params import SamplingParams
from outrider.sampling.pipeline import LogitsPipeline, Logprobs, logprobs_of

__all__ = ["LogitsPipeline", "Logprobs", "SamplingParams", "logprobs_of"]

__getattr__ = names_of(__name__)
