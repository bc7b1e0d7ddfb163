"""What follows from the stored measurements: series of every watch, the LLC with its health, similarity, circuits."""
