"""Where streams come from and go to: one module per URL scheme."""
