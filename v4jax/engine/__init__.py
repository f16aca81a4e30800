"""Many requests on one compiled loop: sequences, pages, prefix cache, drafts, masks."""
