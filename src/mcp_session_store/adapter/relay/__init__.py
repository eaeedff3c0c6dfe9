"""The relay: what a client posts to any instance reaches the copies of its session that it is for."""
