"""Tests of what only the native decoder does."""

from __future__ import annotations

import shutil

import pytest

COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
needs_compiler = pytest.mark.skipif(not COMPILER, reason="the native decoder needs a C++ compiler")
