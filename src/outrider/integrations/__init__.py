"""Outrider inside and beside others' software: one package for each partner, which is imported only when it is used.

Nothing here is needed by the engine. A package that needs a partner which is not installed says which command installs it.
Its tests against the real partner lie in `tests/outside`, and run in an environment of their own (`make test-vllm`, ...).
"""
