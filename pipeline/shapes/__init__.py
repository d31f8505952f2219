"""What rows of published shapes mean. `pipeline.convert` has the table that says which row has which shape."""
