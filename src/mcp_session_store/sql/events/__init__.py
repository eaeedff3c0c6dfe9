"""Events of streams in SQL: appending, reading, trimming, and the instances that write them."""
