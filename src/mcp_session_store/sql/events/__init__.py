"""Events of streams in SQL: appending, reading, following and trimming."""
