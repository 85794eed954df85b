"""Training data: rows of a query, what answers it and what does not, out of many layouts."""
