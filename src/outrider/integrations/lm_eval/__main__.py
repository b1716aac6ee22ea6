"""lm-eval's own command, with the model `outrider` among its models."""

import outrider.integrations.lm_eval  # noqa: F401
from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
