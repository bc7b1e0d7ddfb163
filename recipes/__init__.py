"""Runnable studies. Each is one script: `python recipes/language_model.py --help`."""

if __name__ == "recipes":
    raise ImportError("this folder installs as devmon.recipes: run a recipe as a script, or as `devmon demo`")
