"""Building blocks of transformers: attention, MLP, block, embeddings."""
