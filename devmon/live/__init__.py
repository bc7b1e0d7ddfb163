"""The page of a run that is still training, written again and again or served."""
