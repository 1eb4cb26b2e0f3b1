"""Classical models on the data sets of the recipes: what a network has to beat. One file a task, found by its name."""
