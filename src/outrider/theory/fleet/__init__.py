"""A fleet of replicas under traffic, simulated: see `simulate`."""

from outrider.theory.fleet.nouns import FAILED, OK, REFUSED, Failures, Outcome, Replica, Traffic, poisson
from outrider.theory.fleet.simulate import simulate

__all__ = ["FAILED", "OK", "REFUSED", "Failures", "Outcome", "Replica", "Traffic", "poisson", "simulate"]
