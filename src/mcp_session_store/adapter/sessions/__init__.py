"""Sessions in this process's memory: opened, restored, kept busy, evicted, ended."""
