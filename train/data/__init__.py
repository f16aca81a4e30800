"""From rows of files to packed batches."""
