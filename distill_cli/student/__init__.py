"""The trained model: build, shard, update, and its weights for sync and export."""
