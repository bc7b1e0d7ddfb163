"""The report of a run: content, figures, prose and the pages that show them."""
