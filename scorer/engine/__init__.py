"""The fast twin of `scorer.engine.reference`: NLLs of one causal LM, as fast as this machine can.

`engine`: a model prepared for its device, body and head. `twin`: the body, which is the model's own code on its own
weights, with slow parts exchanged for `packed` linear layers and for `attention` of our own. `heads`: from hidden
states to NLLs without all logits, one way a device, and what else was measured. `reference`: what all this computes.
"""

from scorer.engine.engine import Engine, Settings
from scorer.engine.reference import reference_nll

__all__ = ["Engine", "Settings", "reference_nll"]
