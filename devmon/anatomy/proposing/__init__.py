"""What the layout of a model may be: proposed by what its modules take and give in one pass, and tried."""
