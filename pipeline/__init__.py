"""The Beam jobs: text to block shards, text or block shards to hardness shards."""
