"""What a request asks of sampling, and the law that makes of the target's logits."""

from outrider.sampling.law import Law, Logprobs, finite_rows, logprobs_of
from outrider.sampling.params import SamplingParams

__all__ = ["Law", "Logprobs", "SamplingParams", "finite_rows", "logprobs_of"]
