"""λ̂ of many components of a model in one sweep: which parameters they have, and their chains run together."""
