"""What many runs need: the sweep, its plan and store, the executors, the search and the report."""
