"""What `model.generate(..., custom_generate=FOLDER, trust_remote_code=True)` of transformers runs."""

from outrider.integrations.transformers import generate

__all__ = ["generate"]
