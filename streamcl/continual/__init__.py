"""Methods of continual learning, one module for each idea: found by their `kind`, see `streamcl.plugin`."""
