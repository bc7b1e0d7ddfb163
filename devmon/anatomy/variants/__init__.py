"""Ways of putting a transformer together that are no tree of plain modules: fused maps, built-in attention, outputs."""
