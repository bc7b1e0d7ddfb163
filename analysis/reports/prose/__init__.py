"""The words of a report: what happened, answers, names, evidence."""
