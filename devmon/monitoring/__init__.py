"""What every monitor does, whichever trainer runs the loop: observe, isolate, agree between ranks, keep the budget."""
