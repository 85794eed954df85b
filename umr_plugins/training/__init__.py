"""Fine-tuning: losses as functions of embeddings, batches larger than memory, one process or many."""
