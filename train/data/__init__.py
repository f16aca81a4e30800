"""Training data: from rows in files to packed batches."""
