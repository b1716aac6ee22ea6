"""The native twin of the lean decoder: one C++ call per forward, for few rows per sequence, on CPU."""

from outrider.target.native.runtime import NativeDecoder, load_native

__all__ = ["NativeDecoder", "load_native"]
