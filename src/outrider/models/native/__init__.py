"""The native twin of the lean decoder: one C++ call per forward, for few rows per sequence, on CPU."""

from outrider.models.native.runtime import NativeDecoder, load_native

__all__ = ["NativeDecoder", "load_native"]
