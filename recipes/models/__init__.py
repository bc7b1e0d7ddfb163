"""Models and data of the recipes, where they are more than a few lines."""
