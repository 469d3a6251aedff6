"""From an interaction log to prepared data: ids, catalogue, histories, split and batches."""
