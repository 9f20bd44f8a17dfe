"""Posteriors of simulators: a data source for each task, and scores of posteriors."""
