"""A learned drafter of one linear layer, added as CONTRIBUTING.md says: a folder, a method, a row in each table.

In the package `network.py` and `drafter.py` would lie in `drafters/linear/`, `method.py` would be `train/methods/linear.py`, and
the two rows would stand in `drafters.registry.LEARNED` and `train.methods.registry.METHODS`. An example adds none to the
package: it hands them over where they are used (`tests/train/test_linear_drafter.py`).
"""

from outrider.drafters.registry import LearnedDrafter

from .drafter import load
from .method import Linear

DRAFTER = {"linear": LearnedDrafter(load, folder_types=("linear",))}
"""The row of `drafters.registry.LEARNED`."""
METHOD = {Linear.name: Linear()}
"""The row of `train.methods.registry.METHODS`."""
