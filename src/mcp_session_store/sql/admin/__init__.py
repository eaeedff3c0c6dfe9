"""What operators use: listings, statistics, and the partitions of the table of events."""
