"""Outrider beside its peers: what `benchmarks/peers.py` runs.

`arms` names the workers and what is compared, `pool` starts and stops their processes, `keeper` ends them with
their parent, `run` measures in rounds, `stats` and `report` turn samples into ratios and a page, `install` makes the environments.
A `worker_` file is a script that runs in the environment of its engine and talks over `channel`.
"""
