"""How the arithmetic is done. `eager` is the oracle that every other engine must agree with."""
