"""What operators use: lists, statistics, and the partitions of the table of events."""
