"""Arrow in, batches out: sources of documents, tokenizers, shards, the global order, packing, the loader."""
