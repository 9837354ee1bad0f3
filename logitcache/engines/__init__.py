"""Who runs a dump: each worker claims units through leases and processes them; commits are the truth."""
