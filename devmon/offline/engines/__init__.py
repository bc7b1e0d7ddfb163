"""How the checkpoints of a study are spread over processes and machines."""
