"""How the settings of an estimate are chosen: what the Hessian promises, what trials show, and the decisions."""
