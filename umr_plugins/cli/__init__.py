"""The `umr` command: one file per verb, each a thin shell over one library call."""
