"""lm-eval's own command, with the model `outrider` among its models."""

from lm_eval.__main__ import cli_evaluate  # type: ignore[import-not-found]

import outrider.integrations.lm_eval  # noqa: F401

if __name__ == "__main__":
    cli_evaluate()
